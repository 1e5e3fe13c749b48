"""The engine of vLLM: its scheduler batches all answers, LoRA adapters by name. For servers with GPUs.

vLLM gets token ids and gives token ids; prompts, stop ids and text stay ours. Its client runs in an event loop of its
own thread, the model in processes that vLLM starts. What is said here of GPUs has never run on one: the tests use
vLLM's build for processors.
"""

import asyncio
import contextlib
import gc
import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from entrypoints.checkpoint.adapters import Adapter, open_adapter
from entrypoints.checkpoint.manifest import refuse_other_base
from entrypoints.checkpoint.native import NativeCheckpoint, open_native
from entrypoints.engines.background import BackgroundLoop
from entrypoints.engines.base import Token
from entrypoints.engines.guard import Guard
from entrypoints.engines.vllm_settings import (
    device_settings,
    lora_settings,
    model_settings,
    prepare,
    refuse_prefixes,
)
from entrypoints.errors import UserError
from entrypoints.prompt import PromptFormat
from entrypoints.sampling import Sampling

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.1  # how soon an answer that has no token yet hears that nobody wants it any more
SEEDS = 1 << 63


class VllmEngine:
    """A model in vLLM's processes; calls beyond `slots` wait in its scheduler."""

    name = "vllm"
    features = frozenset(
        {"seed", "top_logprobs", "repetition_penalty", "frequency_penalty", "presence_penalty", "json_schema"}
    )

    def __init__(
        self, checkpoint: NativeCheckpoint, adapters: Mapping[str, Adapter], slots: int, loop: BackgroundLoop
    ) -> None:
        self.tokenizer = checkpoint.tokenizer
        self.prompt_format = checkpoint.prompt_format
        self.adapters: dict[str, PromptFormat] = {name: adapter.prompt_format for name, adapter in adapters.items()}
        self.window = checkpoint.shape.window
        self.slots = slots
        self._folders = {name: adapter.folder.resolve() for name, adapter in adapters.items()}
        self._loop = loop
        self._guard = Guard()
        self._numbers = itertools.count()
        self._loras: dict[str, Any] = {}
        self._llm: Any = None

    @classmethod
    def load(
        cls,
        model: Path,
        adapters: Mapping[str, Path],
        slots: int,
        device: str = "auto",
        dtype: str = "auto",
        verify: bool = False,
        tensor_parallel_size: int | None = None,
        gpu_memory_utilization: float = 0.9,
        load_in: str | None = None,
    ) -> "VllmEngine":
        """Check and load a native checkpoint and LoRA adapters to choose from by name.

        tensor_parallel_size: GPUs to split each layer over; as few as hold the weights if not given.
        gpu_memory_utilization: share of each GPU's memory that vLLM takes, for weights and cache together.
        load_in: 8bit to make the matrices of the layers smaller while they load, as FP8.
        Raises UserError when something is missing, damaged, does not fit or is a P-Tuning adapter, before vLLM starts.
        """
        checkpoint = open_native(model, verify=verify)
        opened = {name: open_adapter(path, checkpoint.shape) for name, path in adapters.items()}
        refuse_prefixes(opened)
        for path in adapters.values():
            refuse_other_base(path, model)
        kind = prepare(device)
        settings = model_settings(checkpoint, slots) | lora_settings(opened, kind)
        settings |= device_settings(
            checkpoint.shape, slots, kind, dtype, tensor_parallel_size, gpu_memory_utilization, load_in
        )
        logger.info("loading %s with %s", model, settings)
        engine = cls(checkpoint, opened, slots, BackgroundLoop("vllm"))
        try:
            engine._loop.submit(engine._start, settings).result()
        except BaseException as error:
            engine.close()
            if isinstance(error, Exception):
                raise RuntimeError(f"vLLM cannot load {model}: {error}") from error
            raise
        return engine

    @property
    def broken(self) -> str | None:
        """Why the process should be replaced, if it should."""
        return "vLLM's engine died" if not self._loop.closed and self._llm.errored else None

    def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: str | None = None,
        cancelled: threading.Event | None = None,
    ) -> Generator[Token, None, None]:
        """Yield the answer's tokens, without the stop id; closing or cancelling takes it out of the batch at once."""
        parameters = self._parameters(prompt, sampling)
        tokens: queue.SimpleQueue = queue.SimpleQueue()
        answer = self._loop.submit(self._feed, tokens.put, prompt, parameters, adapter)
        answer.add_done_callback(tokens.put)
        try:
            while not (cancelled and cancelled.is_set()):
                try:
                    token = tokens.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    continue
                if token is answer:
                    self._loop.result(answer)
                    return
                yield token
        finally:
            answer.cancel()

    def generate_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """Answers to several prompts, `slots` at a time, without their stop ids."""
        parameters = [self._parameters(prompt, sampling) for prompt in prompts]
        return self._loop.result(self._loop.submit(self._all, prompts, parameters))

    def close(self) -> None:
        """End running calls with an error, and vLLM's processes with them."""
        self._loop.close(self._stop)
        self._guard.dismiss()

    async def _start(self, settings: dict) -> None:
        from vllm import AsyncEngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.async_llm import AsyncLLM

        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))
        for number, (name, folder) in enumerate(self._folders.items(), start=1):
            self._loras[name] = LoRARequest(name, number, str(folder))
            await self._llm.add_lora(self._loras[name])

    async def _stop(self) -> None:
        if self._llm:
            self._llm.shutdown()
            self._llm = None
            gc.collect()  # its ZeroMQ threads end when it is collected; at the interpreter's end that would fail

    async def _feed(self, take: Any, prompt: Sequence[int], parameters: Any, adapter: str | None) -> None:
        async for token in self._tokens(prompt, parameters, adapter):
            take(token)

    async def _all(self, prompts: Sequence[Sequence[int]], parameters: Sequence[Any]) -> list[list[int]]:
        async def one(prompt: Sequence[int], own: Any) -> list[int]:
            return [int(token) async for token in self._tokens(prompt, own, None)]

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(*asked)) for asked in zip(prompts, parameters, strict=True)]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _tokens(self, prompt: Sequence[int], parameters: Any, adapter: str | None) -> AsyncIterator[Token]:
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input

        outputs = self._llm.generate(
            tokens_input(list(prompt)),
            parameters,
            str(next(self._numbers)),
            lora_request=self._loras[adapter] if adapter else None,
        )
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    part = output.outputs[0]
                    for id_, known in zip(part.token_ids, part.logprobs or itertools.repeat(None)):  # noqa: B905
                        if id_ not in self.tokenizer.stop_ids:
                            yield _token(id_, known, parameters.logprobs)
        except VLLMClientError as error:
            raise UserError(f"vLLM refuses the request: {error}", "change what is asked for") from error
        except Exception as error:
            raise RuntimeError(f"vLLM: {error.__cause__ or error}") from error

    def _parameters(self, prompt: Sequence[int], sampling: Sampling) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

        if len(prompt) >= self.window:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, the window {self.window}", "shorten the conversation"
            )
        schema = sampling.json_schema
        form = None if schema is None else {"json": schema} if schema else {"json_object": True}
        return SamplingParams(
            max_tokens=min(sampling.max_new_tokens, self.window - len(prompt)),
            temperature=0.0 if sampling.greedy else sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or 0,
            repetition_penalty=sampling.repetition_penalty,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            seed=None if sampling.seed is None else sampling.seed % SEEDS,
            logprobs=sampling.top_logprobs,
            structured_outputs=StructuredOutputsParams(**form) if form else None,
            stop_token_ids=list(self.tokenizer.stop_ids),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )


def _token(id_: int, known: Mapping[int, Any] | None, most: int | None) -> Token:
    """known: what vLLM tells of the likeliest ids and the chosen one, by id."""
    if known is None:
        return Token(id_)
    likeliest = sorted(((other, entry.logprob) for other, entry in known.items()), key=lambda pair: -pair[1])
    return Token(id_, known[id_].logprob, likeliest[:most])
