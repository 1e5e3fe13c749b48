"""The transformers engine: any device, LoRA and P-Tuning v2 adapters.

With more than one slot, requests to the base model run through continuous batching if it supports all their options.
Other requests (adapters, seeds, penalties, log probabilities, grammars) are generated one at a time.
"""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GlmForCausalLM, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.chat_format.sampling import Sampling
from entrypoints.checkpoint.adapters import open_adapter
from entrypoints.checkpoint.manifest import check_base_weights
from entrypoints.checkpoint.native import open_native
from entrypoints.checkpoint.tokenizer import Tokenizer
from entrypoints.engines.base import FEATURES, Token
from entrypoints.engines.grammar.json_schema import answer_grammar
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.continuous_batching import ContinuousBatcher, check_batching_memory
from entrypoints.engines.transformers.grammar import GrammarProcessor
from entrypoints.engines.transformers.logits_processors import (
    LogprobRecorder,
    PenaltyProcessor,
    SeededSampler,
    check_finite_logits,
)
from entrypoints.engines.transformers.model import add_adapter, load_model
from entrypoints.engines.transformers.prompt_logprobs import score_prompt
from entrypoints.errors import UserError
from entrypoints.hardware.placement import choose_placement

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.1  # how often a call that waits for its slot checks whether it was cancelled


class TransformersEngine:
    """A model in this process, with any number of adapters on the same weights."""

    name = "transformers"
    features = FEATURES

    def __init__(
        self, model: GlmForCausalLM, tokenizer: Tokenizer, prompt_format: PromptFormat, context_length: int
    ) -> None:
        self.model = model
        self.model.eval()  # type: ignore[no-untyped-call]  # transformers: untyped
        self.tokenizer = tokenizer
        self.prompt_format = prompt_format
        self.adapters: Mapping[str, PromptFormat] = {}
        self.context_length = context_length
        self.slots = 1
        self._adapted_models: dict[str, GlmForCausalLM] = {}
        self._batcher: ContinuousBatcher | None = None
        self._generation_lock = threading.Lock()  # held by the one answer that is generated outside the batch

    @classmethod
    def load(cls, folder: Path, options: EngineOptions) -> "TransformersEngine":
        """Check and load a native checkpoint with its adapters.

        Raises UserError if a file is missing, damaged or of another size, or the model does not fit, before weights are
        read.
        """
        checkpoint = options.limited(open_native(folder, verify=options.verify, quantized=True))
        load_in = checkpoint.load_in or options.load_in
        named = {name: open_adapter(path, checkpoint.model_config) for name, path in options.adapters.items()}
        default = open_adapter(options.adapter, checkpoint.model_config) if options.adapter else None
        for path in options.all_adapters:
            check_base_weights(path, folder)
        placement = choose_placement(
            checkpoint.model_config,
            options.device,
            options.dtype,
            load_in,
            already_quantized=checkpoint.load_in is not None,
        )
        batched = options.slots > 1 and len(set(placement.device_map.values())) == 1 and not load_in and not default
        if batched:
            check_batching_memory(checkpoint.model_config, options.slots, placement)
        logger.info("loading %s on %s", folder, placement)
        model = load_model(folder, placement, load_in)
        engine = cls(
            add_adapter(model, default) if default else model,
            checkpoint.tokenizer,
            default.prompt_format if default else checkpoint.prompt_format,
            checkpoint.model_config.context_length,
        )
        engine._adapted_models = {name: add_adapter(model, adapter) for name, adapter in named.items()}
        engine.adapters = {name: adapter.prompt_format for name, adapter in named.items()}
        if batched:
            stop_ids, engine.slots = checkpoint.tokenizer.stop_ids, options.slots
            engine._batcher = ContinuousBatcher(model, stop_ids, engine.context_length, options.slots)
        return engine

    @property
    def fatal_error(self) -> str | None:
        """Why the process must be restarted, if it must."""
        if not (self._batcher and self._batcher.is_dead):
            return None
        return str(self._batcher.failure or "the batching loop died")

    def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: str | None = None,
        cancelled: threading.Event | None = None,
    ) -> Generator[Token, None, None]:
        """Yield the tokens of the answer, without the stop token; closing or cancelling stops at the next token."""
        self._check_length(len(prompt))
        cancelled = cancelled or threading.Event()
        recorder = LogprobRecorder(sampling.top_logprobs)
        if self._batcher and adapter is None and self._batcher.supports(sampling):
            max_new_tokens = min(sampling.max_new_tokens, self.context_length - len(prompt))
            ids = self._batcher.generate(prompt, replace(sampling, max_new_tokens=max_new_tokens), cancelled)
        else:
            model = self._adapted_models[adapter] if adapter else self.model
            ids = self._stream(model, self._generate_arguments([prompt], sampling, recorder), cancelled)
        try:
            for id_ in ids:
                yield recorder.token(id_) if sampling.top_logprobs is not None else Token(id_)
        finally:
            ids.close()

    def score(
        self,
        prompt: Sequence[int],
        top_logprobs: int,
        adapter: str | None = None,
        cancelled: threading.Event | None = None,
    ) -> list[Token]:
        """The ids of a prompt with their log probabilities; cancelling takes effect between chunks."""
        self._check_length(len(prompt))
        cancelled = cancelled or threading.Event()
        model = self._adapted_models[adapter] if adapter else self.model
        with self._generation_slot(cancelled) as acquired, torch.inference_mode():
            return score_prompt(model, prompt, top_logprobs, cancelled) if acquired else []

    def generate_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """Answers to several prompts in one left-padded batch, without stop tokens and padding."""
        prompt_length = max(map(len, prompts))
        self._check_length(prompt_length)
        arguments = self._generate_arguments(prompts, sampling, LogprobRecorder(None))
        with self._generation_lock, torch.inference_mode():
            ids = self.model.generate(**arguments)  # (B, prompt + answer)
        return [self._until_stop(row) for row in ids[:, prompt_length:].tolist()]

    def close(self) -> None:
        """Stop the batching loop."""
        if self._batcher:
            self._batcher.close()

    def _check_length(self, prompt_length: int) -> None:
        if prompt_length >= self.context_length:
            raise UserError(
                f"the prompt has {prompt_length} tokens, the context length is {self.context_length}",
                "shorten the conversation",
            )

    def _stream(
        self, model: GlmForCausalLM, arguments: dict[str, Any], cancelled: threading.Event
    ) -> Generator[int, None, None]:
        """Run `model.generate` in a thread and yield its ids (B = 1) as they come."""
        streamer, abandoned = _TokenStreamer(), threading.Event()

        def should_stop(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:  # (B, T), (B, V) -> (B,)
            stop = abandoned.is_set() or cancelled.is_set()
            return torch.full((ids.shape[0],), stop, dtype=torch.bool, device=ids.device)

        arguments = arguments | {"streamer": streamer, "stopping_criteria": StoppingCriteriaList([should_stop])}

        def work() -> None:
            """Generate into the streamer; errors are raised again by the reader."""
            try:
                with self._generation_slot(cancelled) as acquired, torch.inference_mode():
                    if acquired:
                        model.generate(**arguments)
                    else:
                        streamer.end()
            except BaseException as error:  # noqa: BLE001 - raised again in the reader's thread
                streamer.fail(error)

        worker = threading.Thread(target=work, name="generate", daemon=True)
        worker.start()
        try:
            while (id_ := streamer.next_id()) is not None:
                if id_ not in self.tokenizer.stop_ids:
                    yield id_
        finally:
            abandoned.set()
            worker.join()

    @contextlib.contextmanager
    def _generation_slot(self, cancelled: threading.Event) -> Iterator[bool]:
        """Hold the generation lock; False if the call was cancelled while it waited."""
        while not (acquired := self._generation_lock.acquire(timeout=POLL_SECONDS)) and not cancelled.is_set():
            pass
        try:
            yield acquired
        finally:
            if acquired:
                self._generation_lock.release()

    def _generate_arguments(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, recorder: LogprobRecorder
    ) -> dict[str, Any]:
        """Arguments of `model.generate` for one left-padded batch."""
        device = next(self.model.get_input_embeddings().parameters()).device
        prompt_length = max(map(len, prompts))
        # the recorder comes before the penalties: log probabilities are the model's own
        processors: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
            check_finite_logits,
            recorder,
            PenaltyProcessor(sampling, prompt_length),
        ]
        grammar = answer_grammar(sampling)
        if grammar is not None:
            temperature = 0 if sampling.greedy else sampling.temperature
            processors.append(GrammarProcessor(grammar, self.tokenizer, prompt_length, temperature))
        arguments: dict[str, Any] = {"do_sample": False}
        if sampling.seed is not None and not sampling.greedy:
            processors.append(SeededSampler(sampling, sampling.seed, device))  # greedy search takes what it sampled
        elif not sampling.greedy:
            arguments = {
                "do_sample": True,
                "temperature": float(sampling.temperature),
                "top_p": float(sampling.top_p),
                "top_k": sampling.top_k or 0,
            }
        return arguments | {
            **_left_padded(prompts, self.tokenizer.pad_id, device),
            "max_new_tokens": min(sampling.max_new_tokens, self.context_length - prompt_length),
            "eos_token_id": list(self.tokenizer.stop_ids),
            "pad_token_id": self.tokenizer.pad_id,
            "logits_processor": LogitsProcessorList(processors),
        }

    def _until_stop(self, ids: list[int]) -> list[int]:
        stops = [index for index, id_ in enumerate(ids) if id_ in self.tokenizer.stop_ids]
        return ids[: stops[0]] if stops else ids


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, both (B, T) with T the length of the longest prompt."""
    length = max(map(len, prompts))
    ids = [[pad_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


class _TokenStreamer(BaseStreamer):
    """Passes each new id from the generating thread to the reader."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt (1, T) first, then with each new id (1,)."""
        if self._has_prompt:
            self._queue.put(int(value.reshape(-1)[-1]))
        self._has_prompt = True

    def end(self) -> None:
        self._queue.put(None)

    def fail(self, error: BaseException) -> None:
        self._queue.put(error)

    def next_id(self) -> int | None:
        """The next id, None at the end; raises the error of the generating thread."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item
