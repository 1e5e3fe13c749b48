"""Whether the disk holds what a run will write: checkpoints with the state of the optimizer, and the result."""

import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.checkpoint.tokenizer import TOKENIZER_FILE, VOCABULARY_FILE
from entrypoints.errors import UserError
from entrypoints.hardware.placement import weight_bytes
from entrypoints.sizes import format_size
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.checkpoints.folders import Checkpoint, checkpoint_folders
from entrypoints.training.checkpoints.output_dir import result_files
from entrypoints.training.methods import trainable_model
from entrypoints.training.methods.deepspeed_config import Config, zero_stage

if TYPE_CHECKING:
    import torch

    from entrypoints.training.run_context import RunContext

ADAM_BYTES = 8  # for each trainable parameter: two moments in float32
SMALL_FILES = 1_000_000  # configuration, random states, log and reports


@dataclass(frozen=True)
class DiskNeed:
    """Bytes of one checkpoint and of the result, and how many checkpoints a run saves and keeps."""

    checkpoint: int
    result: int
    saved: int
    kept: int

    @property
    def count(self) -> int:
        """Checkpoints at once: a new one is complete before the oldest is removed."""
        return min(self.saved, self.kept + 1)

    @property
    def peak(self) -> int:
        """The most that is on disk at once."""
        return max(self.count * self.checkpoint, min(self.saved, self.kept) * self.checkpoint + self.result)

    def __str__(self) -> str:
        return (
            f"{self.count} x {format_size(self.checkpoint)} for checkpoints with the state of the optimizer, "
            f"{format_size(self.result)} for the result"
        )


@dataclass(frozen=True)
class DiskPlan:
    """What decides how much a run writes: its options, the model, and bytes of the base model's files."""

    arguments: TrainArguments
    model_config: ModelConfig
    compute_dtype: "torch.dtype"
    deepspeed: Config | None
    base_bytes: int  # of the weights, in whose dtype a complete model is saved
    tokenizer_bytes: int = 0

    @classmethod
    def of_run(cls, run: "RunContext") -> "DiskPlan":
        """The plan of a run whose base model is here."""
        base = run.base
        tokenizer = sum(_size(base.folder / name) for name in (TOKENIZER_FILE, VOCABULARY_FILE))
        dtype = run.precision.compute_dtype
        return cls(run.arguments, base.model_config, dtype, run.deepspeed, base.files.nbytes, tokenizer)

    def estimate(self, steps: int) -> DiskNeed:
        """What so many optimizer steps write."""
        arguments = self.arguments
        saved = math.ceil(steps / arguments.save_steps)
        return DiskNeed(self._checkpoint_bytes(), self._result_bytes(), saved, self._kept() or saved)

    def __str__(self) -> str:
        """Sizes, and how many checkpoints there are: the number of steps is known with --max-steps only."""
        arguments, need = self.arguments, self.estimate(self.arguments.max_steps or 1)
        if arguments.max_steps:
            return f"disk: up to {format_size(need.peak)} ({need})"
        kept = self._kept()
        count = f"up to {kept + 1} at once" if kept else "all are kept without --save-total-limit"
        return (
            f"disk: {format_size(need.checkpoint)} for each checkpoint with the state of the optimizer, one every "
            f"{arguments.save_steps} steps, {count}; {format_size(need.result)} for the result"
        )

    def _kept(self) -> int | None:
        """Checkpoints that stay at most; None: all."""
        limit = self.arguments.save_total_limit
        best = 2 if self.arguments.validation_file else 1  # the best one and the newest
        return None if limit is None else max(limit, best)

    def _checkpoint_bytes(self) -> int:
        arguments, width, total = self.arguments, self.compute_dtype.itemsize, weight_bytes(self.model_config, 1)
        trainable = trainable_model.count_trainable(arguments, self.model_config, total)
        if arguments.saves_adapter:
            weights = 4 * trainable + self._prefix_bytes()
        elif self.deepspeed:
            weights = self._result_bytes()
        else:
            weights = (4 if arguments.method == "full" else width) * (total - trainable) + 4 * trainable
        states = ADAM_BYTES * trainable
        if self.deepspeed:  # a float32 copy, and the parameters of the modules once more
            in_modules = trainable if arguments.method in ("lora", "qlora") else total
            states += 4 * trainable + (width * in_modules if zero_stage(self.deepspeed) < 3 else 0)
            states += width * (total - trainable) if zero_stage(self.deepspeed) == 3 else 0  # frozen ones
        return weights + states + self._small_bytes()

    def _result_bytes(self) -> int:
        if not self.arguments.saves_adapter:
            return self.base_bytes + self._small_bytes()
        trainable = trainable_model.count_trainable(
            self.arguments, self.model_config, weight_bytes(self.model_config, 1)
        )
        return 4 * trainable + self._prefix_bytes() + self._small_bytes()

    def _prefix_bytes(self) -> int:
        """The computed keys and values beside the trained encoder."""
        return 4 * self.arguments.prefix_length * self.model_config.num_layers * sum(self.model_config.qkv_rows[1:])

    def _small_bytes(self) -> int:
        return SMALL_FILES + (0 if self.arguments.saves_adapter else self.tokenizer_bytes)


def check_disk(run: "RunContext", steps: int, resumed: Checkpoint | None = None) -> str:
    """A description of what the run will write. Raises UserError: the disk of the output folder cannot hold it."""
    plan = DiskPlan.of_run(run)
    folder, need = run.arguments.output_dir, plan.estimate(steps)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free + sum(map(_size, _replaced(folder, resumed)))
    if need.peak > free:
        raise UserError(
            f"the run writes up to {format_size(need.peak)} to {folder} ({need}), its disk has {format_size(free)} "
            "free",
            _remedy(plan, steps, free),
        )
    return f"up to {format_size(need.peak)} ({need}), {format_size(free)} are free"


def _remedy(plan: DiskPlan, steps: int, free: int) -> str:
    """The smallest change that fits."""

    def fits(arguments: TrainArguments) -> bool:
        return replace(plan, arguments=arguments).estimate(steps).peak <= free

    need = plan.estimate(steps)
    for limit in range(need.kept - 1, 0, -1):
        if fits(replace(plan.arguments, save_total_limit=limit)):
            return f"--save-total-limit {limit} would fit"
    if fits(replace(plan.arguments, save_steps=steps)):
        return f"--save-steps {steps} would fit: one checkpoint, at the end"
    missing = format_size(need.checkpoint + need.result - free)
    remedy = f"free {missing} for one checkpoint and the result, or use another disk"
    return remedy if plan.arguments.saves_adapter else f"{remedy}; the checkpoints of --method lora are small"


def _replaced(folder: Path, resumed: Checkpoint | None) -> Iterator[Path]:
    """What a new run removes, or the checkpoints that a resumed one counts among its own."""
    if not folder.is_dir():
        return
    for checkpoint in checkpoint_folders(folder):
        if resumed is None or int(checkpoint.name.rpartition("-")[2]) <= resumed.step:
            yield checkpoint
    yield from result_files(folder)


def _size(path: Path) -> int:
    files: Iterable[Path] = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
