"""The engine of plain transformers: any device, LoRA and P-Tuning v2 adapters, one stream or one padded batch."""

import logging
import queue
import threading
from collections.abc import Generator, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from entrypoints.checkpoint.adapters import Adapter, open_adapter
from entrypoints.checkpoint.native import open_native
from entrypoints.checkpoint.tokenizer import Tokenizer
from entrypoints.engines.placement import Placement, place
from entrypoints.engines.prefix import PrefixedGlm
from entrypoints.errors import UserError
from entrypoints.prompt import PromptFormat
from entrypoints.sampling import Sampling

logger = logging.getLogger(__name__)
END = None  # the streamer's last word


class TransformersEngine:
    """A model in this process. One generation runs at a time; further callers wait."""

    def __init__(self, model: torch.nn.Module, tokenizer: Tokenizer, prompt_format: PromptFormat, window: int) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.prompt_format = prompt_format
        self.window = window
        self._turn = threading.Lock()

    @classmethod
    def load(
        cls, folder: Path, adapter: Path | None = None, device: str = "auto", dtype: str = "auto", verify: bool = False
    ) -> "TransformersEngine":
        """Check and load a native checkpoint and an adapter.

        Raises UserError naming what is missing, damaged, of another size or does not fit, before weights are read.
        """
        checkpoint = open_native(folder, verify=verify)
        opened = open_adapter(adapter, checkpoint.shape) if adapter else None
        placement = place(checkpoint.shape, device, dtype)
        logger.info("loading %s%s on %s", folder, f" with adapter {adapter}" if adapter else "", placement)
        model = _load_model(folder, opened, placement)
        prompt_format = opened.prompt_format if opened else checkpoint.prompt_format
        return cls(model, checkpoint.tokenizer, prompt_format, checkpoint.shape.window)

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Generator[int, None, None]:
        """Yield the answer's ids, without the stop id; closing the generator stops the model at its next token."""
        settings = self._settings([prompt], sampling)
        streamer, stopped = _IdStreamer(), threading.Event()
        settings["streamer"] = streamer
        settings["stopping_criteria"] = StoppingCriteriaList([lambda ids, scores: _all_rows(ids, stopped.is_set())])
        worker = threading.Thread(target=self._work, args=(settings, sampling, streamer), daemon=True)
        worker.start()
        try:
            while (id_ := streamer.get()) is not END:
                if id_ not in self.tokenizer.stop_ids:
                    yield id_
        finally:
            stopped.set()
            worker.join()

    def generate_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """Answers to several prompts, padded on the left with their mask; without stop ids and padding."""
        settings = self._settings(prompts, sampling)
        width = settings["input_ids"].shape[1]
        with self._turn, torch.inference_mode():
            _seed(sampling)
            rows = self.model.generate(**settings)[:, width:].tolist()
        return [self._until_stop(row) for row in rows]

    def _work(self, settings: dict, sampling: Sampling, streamer: "_IdStreamer") -> None:
        try:
            with self._turn, torch.inference_mode():
                _seed(sampling)
                self.model.generate(**settings)
        except BaseException as error:  # noqa: BLE001 - handed over to the caller's thread, which raises it
            streamer.fail(error)

    def _settings(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> dict:
        longest = max(len(prompt) for prompt in prompts)
        if longest >= self.window:
            raise UserError(f"the prompt has {longest} tokens, the window {self.window}", "shorten the conversation")
        device = self.model.get_input_embeddings().weight.device
        pad = self.tokenizer.pad_id
        ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        greedy = sampling.temperature == 0
        choice = (
            {}
            if greedy
            else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or 0}
        )
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
            "max_new_tokens": min(sampling.max_new_tokens, self.window - longest),
            "do_sample": not greedy,
            "repetition_penalty": sampling.repetition_penalty,
            "eos_token_id": list(self.tokenizer.stop_ids),
            "pad_token_id": pad,
            "logits_processor": LogitsProcessorList([_refuse_broken_numbers]),
            **choice,
        }

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


def _load_model(folder: Path, adapter: Adapter | None, placement: Placement) -> torch.nn.Module:
    transformers_logging.disable_progress_bar()
    prefixed = adapter is not None and adapter.pre_seq_len is not None
    loader = PrefixedGlm if prefixed else AutoModelForCausalLM
    model = loader.from_pretrained(
        folder, dtype=placement.dtype, device_map=placement.device_map, local_files_only=True
    )
    model.generation_config.top_k = None  # every request says what it wants; nothing is inherited unseen
    if prefixed:
        model.prefix = adapter.prefix()
    elif adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter.folder, is_trainable=False)
    return model


def _refuse_broken_numbers(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    if torch.isnan(scores).any():
        raise UserError("the model computed numbers that are none (NaN)", "load it with --dtype float32 or bfloat16")
    return scores


def _all_rows(ids: torch.Tensor, value: bool) -> torch.Tensor:
    return torch.full((ids.shape[0],), value, dtype=torch.bool, device=ids.device)


def _seed(sampling: Sampling) -> None:
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
