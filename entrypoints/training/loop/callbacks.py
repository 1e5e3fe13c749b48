"""Callbacks of a run: progress bar and log lines, an end to a diverged run, and a checkpoint on SIGTERM or SIGINT."""

import contextlib
import logging
import math
import signal
import time
from collections import deque
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from entrypoints.errors import UserError

logger = logging.getLogger(__name__)
SAME_SIGNAL_SECONDS = 3.0  # a terminal and a launcher both deliver one Ctrl-C
SKIPPED_STEPS_PER_INVALID = 10  # fp16 skips steps until its loss scale is low enough
DIVERGENCE_REMEDY = "lower --learning-rate, and prefer --bf16 or float32 to --fp16"
LOGGED_VALUES = ("loss", "eval_loss", "train_loss", "learning_rate")


class SaveOnSignal(TrainerCallback):
    """On SIGTERM or SIGINT: saves a checkpoint and stops after the current step of all processes."""

    received: int | None = None
    _received_at = 0.0

    @contextlib.contextmanager
    def handling(self) -> Iterator[None]:
        """Handle both signals inside the block; a second signal ends the process at once."""
        previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def handle(number: int, frame: FrameType | None) -> None:
            if self.received is None:
                self.received, self._received_at = number, time.monotonic()
            elif time.monotonic() - self._received_at > SAME_SIGNAL_SECONDS:
                self.raise_received()

        for number in previous:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """All processes agree on a signal that any of them received, save and stop."""
        number = self.received or 0
        if torch.distributed.is_initialized():
            agreed = torch.tensor([number], device=args.device)
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
            number = int(agreed)
        if number:
            self.received = number
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # whoever sent the signal does not wait
            logger.warning("received %s: saving step %d", signal.Signals(number).name, state.global_step)

    def raise_received(self) -> None:
        """End the process as the received signal would have ended it; returns when there was none."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received:
            raise SystemExit(128 + self.received)


class EvaluateCheckpoints(TrainerCallback):
    """With validation rows: evaluates each step that is saved, and no step twice.

    saves_best: also save each step whose loss is lower than all before. lowest: the lowest loss before this run.
    """

    def __init__(self, saves_best: bool, lowest: float | None) -> None:
        self.saves_best = saves_best
        self.lowest = math.inf if lowest is None else lowest
        self.step, self.loss = -1, math.nan  # of the last evaluation

    def loss_at(self, step: int) -> float | None:
        """The validation loss of a step, None if it was not evaluated."""
        return self.loss if self.step == step else None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint is comparable only with its loss."""
        control.should_evaluate = (control.should_evaluate or control.should_save) and self.step != state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The last step of an epoch may have been evaluated for its checkpoint."""
        self.on_step_end(args, state, control, **kwargs)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the loss; the one before the first step is that of the base model."""
        self.step, self.loss = state.global_step, (metrics or {}).get("eval_loss", math.nan)
        if state.global_step and self.loss < self.lowest:
            self.lowest = self.loss
            control.should_save = control.should_save or self.saves_best


class InvalidStepCounter:
    """Counts consecutive steps without a usable loss or gradient; raises UserError above the limit."""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps
        self.invalid_losses = self.skipped_steps = 0
        self.last_step, self.last_loss = 0, 1.0

    def record(self, loss: float, skipped: bool, step: int) -> None:
        """One step with its loss; skipped: the optimizer skipped it because a gradient overflowed."""
        self.invalid_losses = 0 if math.isfinite(loss) and loss != 0 else self.invalid_losses + 1
        self.skipped_steps = self.skipped_steps + 1 if skipped else 0
        self.last_step, self.last_loss = step, loss
        if self.invalid_losses >= self.max_steps:
            self._raise()
        if self.skipped_steps >= self.max_steps * SKIPPED_STEPS_PER_INVALID:
            raise UserError(
                f"gradients overflowed in {self.skipped_steps} consecutive steps, up to step {step}", DIVERGENCE_REMEDY
            )

    def check_last(self) -> None:
        """At the end of a run: raise UserError if the last loss is not finite, because the weights are not either."""
        if not math.isfinite(self.last_loss):
            self._raise()

    def _raise(self) -> NoReturn:
        cause = "no label is left in the rows" if self.last_loss == 0 else "values overflowed"
        steps = f"{self.invalid_losses} consecutive steps, up to step {self.last_step}"
        raise UserError(f"the loss was {self.last_loss} in {steps}: {cause}", DIVERGENCE_REMEDY)


class LossReader:
    """Passes the loss of each optimizer step to an InvalidStepCounter, on CUDA one step later.

    Reading it at once would make the CPU wait for the GPU, and then the GPU until the CPU has queued the next kernels.
    """

    def __init__(self, counter: InvalidStepCounter) -> None:
        self.counter = counter
        self._unread: deque[tuple[torch.Tensor, torch.cuda.Event | None, bool, int]] = deque()

    def add(self, loss: torch.Tensor, skipped: bool, step: int) -> None:
        """Note the loss of a step, a scalar; reads that of the step before if this one is not computed yet."""
        value, computed = loss.detach().to("cpu", non_blocking=True), None
        if loss.is_cuda:
            computed = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch: untyped
            computed.record()
        self._unread.append((value, computed, skipped, step))
        self._read(keep=1 if computed else 0)

    def check_last(self) -> None:
        """At the end of a run: as InvalidStepCounter.check_last."""
        self._read(keep=0)
        self.counter.check_last()

    def _read(self, keep: int) -> None:
        while len(self._unread) > keep:
            value, computed, skipped, step = self._unread.popleft()
            if computed:
                computed.synchronize()
            self.counter.record(value.item(), skipped, step)


class LogProgress(TrainerCallback):
    """A progress bar on stderr and log lines; ends a run whose validation loss is not finite."""

    bar: "tqdm[Any]"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar, from the resumed step on."""
        disable = True if not state.is_world_process_zero else None  # None: shown on a terminal
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step", disable=disable)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log the main values; raises UserError when the validation loss is not finite."""
        values = {name: value for name, value in (logs or {}).items() if name in LOGGED_VALUES}
        if not values:
            return
        if not math.isfinite(values.get("eval_loss", 0.0)):
            raise UserError(f"eval_loss at step {state.global_step} is {values['eval_loss']}", DIVERGENCE_REMEDY)
        with tqdm.external_write_mode():
            logger.info(
                "step %d: %s", state.global_step, ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.bar.close()
