"""The vLLM engine: its scheduler batches all answers, with LoRA adapters selected by name. For servers with GPUs.

vLLM receives and returns token ids; prompt format and text are handled outside it. Its client runs in an event loop in
a thread of its own, the model in processes that vLLM starts. It has not been run on a GPU: the tests use vLLM's CPU
build.
"""

import asyncio
import concurrent.futures
import contextlib
import gc
import itertools
import logging
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.chat_format.sampling import Sampling
from entrypoints.checkpoint.adapters import Adapter, open_adapter
from entrypoints.checkpoint.manifest import check_base_weights
from entrypoints.checkpoint.native import NativeCheckpoint, open_native
from entrypoints.engines.base import FEATURES, Token
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.vllm.child_watchdog import ChildWatchdog
from entrypoints.engines.vllm.engine_args import (
    check_adapters,
    device_settings,
    lora_settings,
    model_settings,
    prepare,
)
from entrypoints.engines.vllm.event_loop import BackgroundLoop
from entrypoints.errors import UserError

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.1  # how often a call that waits for a token checks whether it was cancelled
SEED_RANGE = 1 << 63


class VllmEngine:
    """A model in vLLM's processes; calls beyond `slots` wait in its scheduler."""

    name = "vllm"
    features = FEATURES

    def __init__(
        self, checkpoint: NativeCheckpoint, adapters: Mapping[str, Adapter], slots: int, loop: BackgroundLoop
    ) -> None:
        self.tokenizer = checkpoint.tokenizer
        self.prompt_format = checkpoint.prompt_format
        self.adapters: Mapping[str, PromptFormat] = {name: adapter.prompt_format for name, adapter in adapters.items()}
        self.context_length = checkpoint.model_config.context_length
        self.slots = slots
        self._folders = {name: adapter.folder.resolve() for name, adapter in adapters.items()}
        self._loop = loop
        self._watchdog = ChildWatchdog()
        self._request_numbers = itertools.count()
        self._lora_requests: dict[str, Any] = {}
        self._llm: Any = None

    @classmethod
    def load(cls, folder: Path, options: EngineOptions) -> "VllmEngine":
        """Check and load a native checkpoint and LoRA adapters; `load_in` 8bit loads the layers' matrices as FP8.

        Raises UserError when something is missing, damaged, does not fit or is a P-Tuning adapter, before vLLM starts.
        """
        checkpoint = options.limited(open_native(folder, verify=options.verify))
        adapters = {name: open_adapter(path, checkpoint.model_config) for name, path in options.adapters.items()}
        check_adapters(adapters)
        for path in options.adapters.values():
            check_base_weights(path, folder)
        kind = prepare(options.device)
        settings = model_settings(checkpoint, options) | lora_settings(adapters, kind)
        settings |= device_settings(checkpoint.model_config, kind, options)
        logger.info("loading %s with %s", folder, settings)
        engine = cls(checkpoint, adapters, options.slots, BackgroundLoop("vllm"))
        try:
            engine._loop.submit(engine._start, settings).result()
        except BaseException as error:
            engine.close()
            if isinstance(error, Exception):
                raise RuntimeError(f"vLLM cannot load {folder}: {error}") from error
            raise
        return engine

    @property
    def fatal_error(self) -> str | None:
        """Why the process must be restarted, if it must."""
        return "vLLM's engine died" if not self._loop.closed and self._llm.errored else None

    def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: str | None = None,
        cancelled: threading.Event | None = None,
    ) -> Generator[Token, None, None]:
        """Yield the tokens of the answer, without the stop token; closing or cancelling ends it at once."""
        parameters = self._sampling_params(prompt, sampling)
        items: queue.SimpleQueue[Token | None] = queue.SimpleQueue()  # None at the end
        answer = self._loop.submit(self._send_tokens, items.put, prompt, parameters, adapter)
        answer.add_done_callback(lambda _: items.put(None))
        try:
            while not (cancelled and cancelled.is_set()):
                try:
                    token = items.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    continue
                if token is None:
                    self._loop.result(answer)
                    return
                yield token
        finally:
            answer.cancel()

    def score(
        self,
        prompt: Sequence[int],
        top_logprobs: int,
        adapter: str | None = None,
        cancelled: threading.Event | None = None,
    ) -> list[Token]:
        """The ids of a prompt with their log probabilities; cancelling takes effect at once."""
        parameters = self._sampling_params(prompt, Sampling(max_new_tokens=1, temperature=0))
        parameters.prompt_logprobs = top_logprobs
        answer = self._loop.submit(self._scores, prompt, parameters, adapter)
        try:
            while not (cancelled and cancelled.is_set()):
                if concurrent.futures.wait([answer], POLL_SECONDS).done:
                    return self._loop.result(answer)
            return []
        finally:
            answer.cancel()

    def generate_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """Answers to several prompts, `slots` at a time, without stop tokens."""
        parameters = [self._sampling_params(prompt, sampling) for prompt in prompts]
        return self._loop.result(self._loop.submit(self._answers, prompts, parameters))

    def close(self) -> None:
        """End running calls with an error, and vLLM's processes with them."""
        self._loop.close(self._stop)
        self._watchdog.dismiss()

    async def _start(self, settings: dict[str, Any]) -> None:
        from vllm import AsyncEngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        # the context selects the tokens of a step for the GPU: 2,048 to 16,384; without it always 2,048
        context = UsageContext.OPENAI_API_SERVER
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings), usage_context=context)
        for number, (name, folder) in enumerate(self._folders.items(), start=1):
            self._lora_requests[name] = LoRARequest(name, number, str(folder))
            await self._llm.add_lora(self._lora_requests[name])

    async def _stop(self) -> None:
        if self._llm:
            self._llm.shutdown()
            self._llm = None
            gc.collect()  # its ZeroMQ threads end when it is collected; at interpreter exit that would fail

    async def _send_tokens(
        self, send: Callable[[Token], None], prompt: Sequence[int], parameters: Any, adapter: str | None
    ) -> None:
        async for token in self._tokens(prompt, parameters, adapter):
            send(token)

    async def _answers(self, prompts: Sequence[Sequence[int]], parameters: Sequence[Any]) -> list[list[int]]:
        async def answer(prompt: Sequence[int], own_parameters: Any) -> list[int]:
            return [int(token) async for token in self._tokens(prompt, own_parameters, None)]

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(answer(*pair)) for pair in zip(prompts, parameters, strict=True)]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _tokens(self, prompt: Sequence[int], parameters: Any, adapter: str | None) -> AsyncIterator[Token]:
        async with contextlib.aclosing(self._outputs(prompt, parameters, adapter)) as outputs:
            async for output in outputs:
                delta = output.outputs[0]
                logprobs = delta.logprobs or [None] * len(delta.token_ids)
                for id_, entries in zip(delta.token_ids, logprobs, strict=False):
                    if id_ not in self.tokenizer.stop_ids:
                        yield _token(id_, entries, parameters.logprobs)

    async def _scores(self, prompt: Sequence[int], parameters: Any, adapter: str | None) -> list[Token]:
        entries: Sequence[Any] = ()
        async with contextlib.aclosing(self._outputs(prompt, parameters, adapter)) as outputs:
            async for output in outputs:
                entries = entries or output.prompt_logprobs
        return [_token(id_, found, parameters.prompt_logprobs) for id_, found in zip(prompt, entries, strict=True)]

    async def _outputs(self, prompt: Sequence[int], parameters: Any, adapter: str | None) -> AsyncGenerator[Any, None]:
        """VLLM's outputs for one prompt; its errors are converted."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input

        outputs = self._llm.generate(
            tokens_input(list(prompt)),
            parameters,
            str(next(self._request_numbers)),
            lora_request=self._lora_requests[adapter] if adapter else None,
        )
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    yield output
        except VLLMClientError as error:
            raise UserError(f"vLLM rejected the request: {error}", "change the request") from error
        except Exception as error:
            raise RuntimeError(f"vLLM: {error.__cause__ or error}") from error

    def _sampling_params(self, prompt: Sequence[int], sampling: Sampling) -> Any:
        """The vllm.SamplingParams of one answer; raises UserError if the prompt fills the context window."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

        if len(prompt) >= self.context_length:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, the context length is {self.context_length}",
                "shorten the conversation",
            )
        schema, structure = sampling.json_schema, None
        if schema is not None:
            structure = StructuredOutputsParams(json=schema) if schema else StructuredOutputsParams(json_object=True)
        elif sampling.grammar is not None:
            structure = StructuredOutputsParams(grammar=sampling.grammar)
        return SamplingParams(
            max_tokens=min(sampling.max_new_tokens, self.context_length - len(prompt)),
            temperature=0.0 if sampling.greedy else sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or 0,
            repetition_penalty=sampling.repetition_penalty,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            seed=None if sampling.seed is None else sampling.seed % SEED_RANGE,
            logprobs=sampling.top_logprobs,
            structured_outputs=structure,
            stop_token_ids=list(self.tokenizer.stop_ids),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )


def _token(id_: int, entries: Mapping[int, Any] | None, top_logprobs: int | None) -> Token:
    """entries: vLLM's log probabilities of the most likely ids and the chosen one, by id."""
    if entries is None:
        return Token(id_)
    likeliest = sorted(((other, entry.logprob) for other, entry in entries.items()), key=lambda pair: -pair[1])
    return Token(id_, entries[id_].logprob, likeliest[:top_logprobs])
