"""The engine of plain transformers: any device, LoRA and P-Tuning v2 adapters.

With more than one slot, requests for the model itself run through continuous batching as far as that can do what they
ask for; the rest (adapters, seeds, penalties, log probabilities) is generated one at a time.
"""

import contextlib
import logging
import queue
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GlmForCausalLM,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from entrypoints.checkpoint.adapters import Adapter, open_adapter
from entrypoints.checkpoint.manifest import refuse_other_base
from entrypoints.checkpoint.native import open_native
from entrypoints.checkpoint.tokenizer import Tokenizer
from entrypoints.engines.base import Token
from entrypoints.engines.continuous import ContinuousBatcher, with_shared_weights
from entrypoints.engines.logits import Penalties, Recorder, SeededChoice, refuse_broken_numbers
from entrypoints.engines.placement import Placement, in_fewer_bits, place, share_processors
from entrypoints.engines.prefix import PrefixedGlm
from entrypoints.errors import UserError
from entrypoints.prompt import PromptFormat
from entrypoints.sampling import Sampling
from entrypoints.settings import LOADS

logger = logging.getLogger(__name__)
END = None  # the streamer's last word
POLL_SECONDS = 0.1  # how soon an answer that waits for its turn hears that nobody wants it any more


class TransformersEngine:
    """A model in this process, with any number of adapters on the same weights."""

    name = "transformers"
    features = frozenset({"seed", "top_logprobs", "repetition_penalty", "frequency_penalty", "presence_penalty"})

    def __init__(self, model: torch.nn.Module, tokenizer: Tokenizer, prompt_format: PromptFormat, window: int) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.prompt_format = prompt_format
        self.adapters: dict[str, PromptFormat] = {}
        self.window = window
        self.slots = 1
        self._adapted: dict[str, torch.nn.Module] = {}
        self._batcher: ContinuousBatcher | None = None
        self._turn = threading.Lock()

    @classmethod
    def load(
        cls,
        folder: Path,
        adapter: Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        verify: bool = False,
        load_in: str | None = None,
    ) -> "TransformersEngine":
        """Check and load a native checkpoint, with one adapter in its place if one is named.

        Raises UserError naming what is missing, damaged, of another size or does not fit, before weights are read.
        """
        engine = cls.load_for_serving(
            folder, {"": adapter} if adapter else {}, device, dtype, verify=verify, load_in=load_in
        )
        if adapter:
            engine.model, engine.prompt_format = engine._adapted.pop(""), engine.adapters.pop("")
        return engine

    @classmethod
    def load_for_serving(
        cls,
        folder: Path,
        adapters: Mapping[str, Path],
        device: str = "auto",
        dtype: str = "auto",
        slots: int = 1,
        verify: bool = False,
        load_in: str | None = None,
    ) -> "TransformersEngine":
        """Check and load a native checkpoint and adapters to choose from by name; raises UserError as `load` does."""
        checkpoint = open_native(folder, verify=verify, quantised=True)
        load_in = checkpoint.load_in or load_in
        opened = {name: open_adapter(path, checkpoint.shape) for name, path in adapters.items()}
        for path in adapters.values():
            refuse_other_base(path, folder)
        placement = place(checkpoint.shape, device, dtype, load_in, stored=checkpoint.load_in is not None)
        logger.info("loading %s on %s", folder, placement)
        engine = cls(
            load_model(folder, placement, load_in),
            checkpoint.tokenizer,
            checkpoint.prompt_format,
            checkpoint.shape.window,
        )
        for name, adapter in opened.items():
            logger.info("adding adapter %s", adapter.folder)
            engine._adapted[name] = _adapt(engine.model, adapter)
            engine.adapters[name] = adapter.prompt_format
        if slots > 1 and not load_in and len(set(placement.device_map.values())) == 1:
            engine.slots = slots
            engine._batcher = ContinuousBatcher(engine.model, engine.tokenizer.stop_ids, engine.window, slots)
        return engine

    @property
    def broken(self) -> str | None:
        """Why the process should be replaced, if it should."""
        return "the batching loop died" if self._batcher and self._batcher.broken else None

    def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: str | None = None,
        cancelled: threading.Event | None = None,
    ) -> Generator[Token, None, None]:
        """Yield the answer's tokens, without the stop id; closing or cancelling stops the model at its next token."""
        settings, recorder = self._settings([prompt], sampling)
        cancelled = cancelled or threading.Event()
        if self._batcher and adapter is None and self._batcher.can(sampling):
            batched = Sampling(**{**vars(sampling), "max_new_tokens": settings["max_new_tokens"]})
            ids = self._batcher.generate(prompt, batched, cancelled)
        else:
            ids = self._stream(self._adapted[adapter] if adapter else self.model, settings, cancelled)
        try:
            for id_ in ids:
                yield recorder.token(id_) if sampling.top_logprobs is not None else Token(id_)
        finally:
            ids.close()

    def generate_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """Answers to several prompts, padded on the left with their mask; without stop ids and padding."""
        settings, _ = self._settings(prompts, sampling)
        width = settings["input_ids"].shape[1]
        with self._turn, torch.inference_mode():
            rows = self.model.generate(**settings)[:, width:].tolist()
        return [self._until_stop(row) for row in rows]

    def close(self) -> None:
        """Stop the batching loop."""
        if self._batcher:
            self._batcher.close()

    def _stream(self, model: torch.nn.Module, settings: dict, cancelled: threading.Event) -> Generator[int, None, None]:
        streamer, left = _IdStreamer(), threading.Event()

        def stop(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return _all_rows(ids, left.is_set() or cancelled.is_set())

        settings |= {"streamer": streamer, "stopping_criteria": StoppingCriteriaList([stop])}

        def work() -> None:
            """Generate into the streamer, which is told what failed."""
            try:
                with self._own_turn(cancelled) as ours, torch.inference_mode():
                    if ours:
                        model.generate(**settings)
                    else:
                        streamer.end()
            except BaseException as error:  # noqa: BLE001 - handed over to the caller's thread, which raises it
                streamer.fail(error)

        worker = threading.Thread(target=work, name="generate", daemon=True)
        worker.start()
        try:
            while (id_ := streamer.get()) is not END:
                if id_ not in self.tokenizer.stop_ids:
                    yield id_
        finally:
            left.set()
            worker.join()

    @contextlib.contextmanager
    def _own_turn(self, cancelled: threading.Event) -> Iterator[bool]:
        """Wait for the turn and hold it; False if the answer was cancelled before it came."""
        while not (ours := self._turn.acquire(timeout=POLL_SECONDS)) and not cancelled.is_set():
            pass
        try:
            yield ours
        finally:
            if ours:
                self._turn.release()

    def _settings(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> tuple[dict, Recorder]:
        longest = max(len(prompt) for prompt in prompts)
        if longest >= self.window:
            raise UserError(f"the prompt has {longest} tokens, the window {self.window}", "shorten the conversation")
        device = self.model.get_input_embeddings().weight.device
        pad = self.tokenizer.pad_id
        ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        drawn = not sampling.greedy and sampling.seed is None
        choice = {
            "temperature": float(sampling.temperature),
            "top_p": float(sampling.top_p),
            "top_k": sampling.top_k or 0,
        }
        recorder = Recorder(sampling.top_logprobs)
        # in this order: what is recorded is the model's own opinion
        processors = [refuse_broken_numbers, recorder, Penalties(sampling, longest)]
        if not (drawn or sampling.greedy):
            processors.append(SeededChoice(sampling, device))
        settings = {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
            "max_new_tokens": min(sampling.max_new_tokens, self.window - longest),
            "do_sample": drawn,
            "eos_token_id": list(self.tokenizer.stop_ids),
            "pad_token_id": pad,
            "logits_processor": LogitsProcessorList(processors),
            **(choice if drawn else {}),
        }
        return settings, recorder

    def _until_stop(self, row: list[int]) -> list[int]:
        ends = [index for index, id_ in enumerate(row) if id_ in self.tokenizer.stop_ids]
        return row[: ends[0]] if ends else row


class _IdStreamer(BaseStreamer):
    """Hands each new id from the model's thread to the caller's; the first `put` is the prompt."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._queue.put(int(value.reshape(-1)[-1]))
        self._prompt_seen = True

    def end(self) -> None:
        self._queue.put(END)

    def fail(self, error: BaseException) -> None:
        self._queue.put(error)

    def get(self) -> int | None:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item


def load_model(folder: Path, placement: Placement, load_in: str | None) -> GlmForCausalLM:
    """The model of a native folder; load_in: in fewer bits, whether its files are or not."""
    transformers_logging.disable_progress_bar()
    share_processors()
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    bits = in_fewer_bits(LOADS[load_in], placement.dtype) if load_in else None
    if hasattr(config, "quantization_config"):  # stored so: what is said beside the folder would be ignored
        config.quantization_config, bits = bits.to_dict(), None
    if load_in:  # it says at every matrix of every token that it rounds what it multiplies
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=placement.dtype,
        device_map=placement.device_map,
        local_files_only=True,
        quantization_config=bits,
    )
    model.generation_config = GenerationConfig()  # every request says what it wants; nothing is inherited unseen
    return model


def _adapt(model: GlmForCausalLM, adapter: Adapter) -> torch.nn.Module:
    """The model with an adapter, on the same weights."""
    own = with_shared_weights(model)
    if adapter.pre_seq_len is not None:
        own.__class__ = PrefixedGlm  # the same modules, another forward
        own.prefix = adapter.prefix()
        return own.eval()
    from peft import PeftModel

    return PeftModel.from_pretrained(own, adapter.folder, is_trainable=False).eval()


def _all_rows(ids: torch.Tensor, value: bool) -> torch.Tensor:
    return torch.full((ids.shape[0],), value, dtype=torch.bool, device=ids.device)
