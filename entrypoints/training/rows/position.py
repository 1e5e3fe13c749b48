"""Where a run is in its rows, counted in rows and not in batches, and how many steps are left.

So a resumed run continues with the next row after the batch size, the accumulation or the number of processes changed.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from entrypoints.training.arguments import TrainArguments


@dataclass(frozen=True)
class Position:
    """`rows` of the epoch were trained on; ordered_by: the rows per step that determined the order of that epoch."""

    epoch: int
    rows: int
    ordered_by: int

    def as_dict(self) -> dict[str, int]:
        """For the record of a checkpoint."""
        return asdict(self)


@dataclass(frozen=True)
class StepPlan:
    """The steps of a run: `rows` (of packing: packs) of an epoch, in batches, accumulated, in several processes."""

    rows: int
    batch: int
    accumulation: int
    processes: int

    @classmethod
    def of_run(cls, arguments: TrainArguments, rows: int, processes: int) -> "StepPlan":
        """The plan that the flags describe."""
        return cls(rows, arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps, processes)

    @property
    def rows_per_step(self) -> int:
        """Rows of all processes in one optimizer step."""
        return self.batch * self.accumulation * self.processes

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch; the last one may have fewer rows."""
        return self.steps_for(self.rows)

    def batches_for(self, rows: int) -> int:
        """Batches of each process for this many rows."""
        return math.ceil(math.ceil(rows / self.batch) / self.processes)

    def steps_for(self, rows: int) -> int:
        """Optimizer steps for this many rows, at least one as in the Trainer."""
        return max(1, math.ceil(self.batches_for(rows) / self.accumulation))

    def skipped_steps(self, start: Position) -> int:
        """Steps of this plan that the rows before `start` in its epoch would have taken."""
        return math.ceil(start.rows / self.rows_per_step)

    def advance(self, start: Position, steps: int) -> Position:
        """The position `steps` optimizer steps after `start`."""
        first = self.steps_for(self.rows - start.rows)
        if steps < first:
            return Position(start.epoch, start.rows + steps * self.rows_per_step, start.ordered_by)
        epochs, rest = divmod(steps - first, self.steps_per_epoch)
        return Position(start.epoch + 1 + epochs, rest * self.rows_per_step, self.rows_per_step)

    def first_position(self) -> Position:
        """Where a run without a checkpoint begins."""
        return Position(0, 0, self.rows_per_step)

    def last_step(self, arguments: TrainArguments, start: Position, step: int) -> int:
        """The step at which the run ends; `step` and `start`: where it begins."""
        if arguments.max_steps:
            return arguments.max_steps
        epochs = arguments.num_train_epochs - start.epoch  # to go, with the part of the first one that is done
        if start.rows == 0:
            return step + max(0, math.ceil(epochs * self.steps_per_epoch))
        if epochs < 1:
            return step + max(0, math.ceil(epochs * self.steps_per_epoch) - self.skipped_steps(start))
        return step + self.steps_for(self.rows - start.rows) + math.ceil((epochs - 1) * self.steps_per_epoch)

    def epochs_until(self, last_step: int, start: Position, step: int) -> int:
        """The number of epochs, counted from the first one, that are begun until `last_step`."""
        steps = last_step - step
        if steps <= 0:
            return start.epoch
        first = self.steps_for(self.rows - start.rows)
        return start.epoch + 1 + math.ceil(max(0, steps - first) / self.steps_per_epoch)


def read_position(saved: Any, plan: StepPlan, step: int) -> Position:
    """The position that a checkpoint recorded; older versions did not, and could not change the rows of a step."""
    try:
        return Position(int(saved["epoch"]), int(saved["rows"]), int(saved["ordered_by"]))
    except (TypeError, KeyError, ValueError):
        return plan.advance(plan.first_position(), step)
