"""Whether the disk holds what a run will write: checkpoints with the state of the optimizer, and the result."""

import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from entrypoints.checkpoint.tokenizer import TOKENIZER_FILE, VOCABULARY_FILE
from entrypoints.errors import UserError
from entrypoints.hardware.placement import weight_bytes
from entrypoints.sizes import format_size
from entrypoints.training.checkpoints.folders import Checkpoint, checkpoint_folders
from entrypoints.training.checkpoints.output_dir import result_files
from entrypoints.training.methods import trainable_model
from entrypoints.training.methods.deepspeed_config import zero_stage

if TYPE_CHECKING:
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


def estimate(run: "RunContext", steps: int) -> DiskNeed:
    """What a run of so many optimizer steps writes."""
    arguments = run.arguments
    saved = math.ceil(steps / arguments.save_steps)
    kept = saved if arguments.save_total_limit is None else arguments.save_total_limit
    if arguments.validation_file:
        kept = max(kept, 2)  # the best one and the newest
    return DiskNeed(_checkpoint_bytes(run), _result_bytes(run), saved, kept)


def describe(run: "RunContext") -> str:
    """The size of each checkpoint and of the result."""
    need = estimate(run, steps=1)
    return f"disk: {_bytes(need.checkpoint)} for each checkpoint, {_bytes(need.result)} for the result"


def check_disk(run: "RunContext", steps: int, resumed: Checkpoint | None = None) -> str:
    """A description of what the run will write. Raises UserError: the disk of the output folder cannot hold it."""
    folder, need = run.arguments.output_dir, estimate(run, steps)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free + sum(map(_size, _replaced(folder, resumed)))
    text = (
        f"{need.count} x {_bytes(need.checkpoint)} for checkpoints with the state of the optimizer, "
        f"{_bytes(need.result)} for the result"
    )
    if need.peak > free:
        raise UserError(
            f"the run writes up to {_bytes(need.peak)} to {folder} ({text}), its disk has {_bytes(free)} free",
            _remedy(run, steps, free),
        )
    return f"up to {_bytes(need.peak)} ({text}), {_bytes(free)} are free"


def _remedy(run: "RunContext", steps: int, free: int) -> str:
    """The smallest change that fits."""
    need = estimate(run, steps)
    for limit in range(need.kept - 1, 0, -1):
        if estimate(replace(run, arguments=replace(run.arguments, save_total_limit=limit)), steps).peak <= free:
            return f"--save-total-limit {limit} would fit"
    fewer = replace(run.arguments, save_steps=steps)
    if estimate(replace(run, arguments=fewer), steps).peak <= free:
        return f"--save-steps {steps} would fit: one checkpoint, at the end"
    remedy = (
        f"free {_bytes(need.checkpoint + need.result - free)} for one checkpoint and the result, or use another disk"
    )
    return remedy if run.arguments.saves_adapter else f"{remedy}; the checkpoints of --method lora are small"


def _checkpoint_bytes(run: "RunContext") -> int:
    arguments, model_config = run.arguments, run.base.model_config
    width, total = run.precision.compute_dtype.itemsize, weight_bytes(model_config, 1)
    trainable = trainable_model.count_trainable(arguments, model_config, total)
    if arguments.saves_adapter:
        weights = 4 * trainable + _prefix_bytes(run)
    elif run.deepspeed:
        weights = _result_bytes(run)
    else:
        weights = (4 if arguments.method == "full" else width) * (total - trainable) + 4 * trainable
    states = ADAM_BYTES * trainable
    if run.deepspeed:  # a float32 copy, and the parameters of the modules once more
        in_modules = trainable if arguments.method in ("lora", "qlora") else total
        states += 4 * trainable + (width * in_modules if zero_stage(run.deepspeed) < 3 else 0)
        states += width * (total - trainable) if zero_stage(run.deepspeed) == 3 else 0  # frozen ones
    return weights + states + _small_bytes(run)


def _result_bytes(run: "RunContext") -> int:
    arguments, model_config = run.arguments, run.base.model_config
    total = weight_bytes(model_config, 1)
    if arguments.saves_adapter:
        trainable = trainable_model.count_trainable(arguments, model_config, total)
        return 4 * trainable + _prefix_bytes(run) + _small_bytes(run)
    return run.base.files.nbytes + _small_bytes(run)


def _prefix_bytes(run: "RunContext") -> int:
    """The computed keys and values beside the trained encoder."""
    model_config = run.base.model_config
    return 4 * run.arguments.prefix_length * model_config.num_layers * sum(model_config.qkv_rows[1:])


def _small_bytes(run: "RunContext") -> int:
    files = () if run.arguments.saves_adapter else (TOKENIZER_FILE, VOCABULARY_FILE)
    return SMALL_FILES + sum(_size(run.base.folder / name) for name in files)


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


def _bytes(size: int) -> str:
    return format_size(size)
