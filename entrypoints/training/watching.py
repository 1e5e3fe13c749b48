"""What watches a run: a bar and log lines, an end to a run whose numbers broke, and a save when it is told to stop."""

import contextlib
import logging
import math
import signal
import time
from collections.abc import Iterator

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from entrypoints.errors import UserError

logger = logging.getLogger(__name__)
SAME_SIGNAL_SECONDS = 3.0  # a terminal and a launcher both pass on one Ctrl-C
SKIPPED_PER_BROKEN = 10  # fp16 skips steps until its scale has found its place
CURE = "lower --learning-rate, and prefer --bf16 or float32 to --fp16"


class Interrupts(TrainerCallback):
    """Turns SIGTERM and SIGINT into a save and an end of training, after the step that all processes are in."""

    number: int | None = None
    _since = 0.0

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Catch the signals; one that comes again ends the process at once."""
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def note(number: int, frame: object) -> None:
            if self.number is None:
                self.number, self._since = number, time.monotonic()
            elif time.monotonic() - self._since > SAME_SIGNAL_SECONDS:
                self.raise_if_any()

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """All processes agree on a signal that any of them got, save and stop."""
        number = self.number or 0
        if torch.distributed.is_initialized():
            agreed = torch.tensor([number], device=args.device)
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
            number = int(agreed)
        if number:
            self.number = number
            control.should_save = control.should_training_stop = True
            logger.warning("told to stop (%s): saving step %d", signal.Signals(number).name, state.global_step)

    def raise_if_any(self) -> None:
        """End as the signal would have ended the process."""
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number:
            raise SystemExit(128 + self.number)


class BrokenSteps:
    """Counts steps in a row that taught nothing; raises UserError when there are too many."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.losses = self.skips = 0
        self.last = (0, 1.0)  # step and its loss

    def note(self, loss: float, skipped: bool, step: int) -> None:
        """One step: its loss, and whether the optimizer left it out because a gradient overflowed."""
        self.losses = 0 if math.isfinite(loss) and loss != 0 else self.losses + 1
        self.skips = self.skips + 1 if skipped else 0
        self.last = (step, loss)
        if self.losses >= self.most:
            raise self._error()
        if self.skips >= self.most * SKIPPED_PER_BROKEN:
            raise UserError(f"{self.skips} steps in a row overflowed, up to step {step}, and taught nothing", CURE)

    def end(self) -> None:
        """The run is over; raises UserError when its last loss was no number, for then the weights are none either."""
        if not math.isfinite(self.last[1]):
            raise self._error()

    def _error(self) -> UserError:
        step, loss = self.last
        cause = "no label is left to learn" if loss == 0 else "the numbers overflowed"
        return UserError(f"the loss was {loss} in {self.losses} steps in a row, up to step {step}: {cause}", CURE)


class Progress(TrainerCallback):
    """A bar on stderr, the numbers as log lines, and an end to a run whose held-out loss is no number."""

    bar: tqdm

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        quiet = True if not state.is_world_process_zero else None
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step", disable=quiet)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Log the numbers; raises UserError when the loss of held-out rows is none."""
        shown = ("loss", "eval_loss", "train_loss", "learning_rate")
        numbers = {name: value for name, value in (logs or {}).items() if name in shown}
        if not numbers:
            return
        if not math.isfinite(numbers.get("eval_loss", 0.0)):
            raise UserError(f"the eval_loss at step {state.global_step} is {numbers['eval_loss']}", CURE)
        with tqdm.external_write_mode():
            logger.info(
                "step %d: %s", state.global_step, ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            )

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.close()
