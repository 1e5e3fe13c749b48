"""Speed and memory of a run, which its log shows: tokens per second of all processes, the peak memory of the first."""

import resource
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

GIB = 1 << 30


class SpeedMeter(TrainerCallback):
    """Adds `tokens_per_second` and `memory_gib` to each log event with a loss.

    Tokens count without padding, and only the time of the optimizer steps counts: evaluations and saving do not.
    memory_gib is what this process has reserved on its GPU at most, or on CPUs its peak of resident memory.
    """

    def __init__(self) -> None:
        self._tokens: torch.Tensor | int = 0  # not read before it is logged, for which the CPU waits for the GPU
        self._seconds = 0.0
        self._begin = 0.0

    def add_batch(self, inputs: dict[str, Any]) -> None:
        """Count the tokens of a batch: (B, T) with an attention mask, or packed rows, which have no padding."""
        mask = inputs.get("attention_mask")
        self._tokens = self._tokens + (inputs["input_ids"].numel() if mask is None else mask.sum())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The first batch of an optimizer step."""
        self._begin = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The optimizer has taken its step."""
        self._seconds += time.monotonic() - self._begin

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the values since the last event; all processes log the same events."""
        if not logs or "loss" not in logs:
            return
        tokens = torch.as_tensor(self._tokens, device=args.device).reshape(1).clone()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(tokens)
        if self._seconds > 0:
            logs["tokens_per_second"] = round(int(tokens) / self._seconds, 2)
        logs["memory_gib"] = round(_peak_memory(args.device) / GIB, 3)
        self._tokens, self._seconds = 0, 0.0


def _peak_memory(device: torch.device) -> int:
    """In bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
