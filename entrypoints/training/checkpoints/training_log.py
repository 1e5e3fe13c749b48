"""training_log.jsonl: what the Trainer logs, one JSON object per event, appended during the run."""

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from entrypoints.file_writing import replace_text
from entrypoints.training.checkpoints.trainer_state import is_step
from entrypoints.training.output_files import TRAINING_LOG_FILE
from entrypoints.untrusted import read_json_lines


class TrainingLog(TrainerCallback):
    """Appends every logged event to the file, on rank 0 only.

    An event has `step`, `epoch`, `time` (unix seconds) and the logged values such as `loss`, `learning_rate`,
    `grad_norm` or `eval_loss`; a value that is not finite is null.
    """

    def __init__(self, output_dir: Path) -> None:
        self.file = output_dir / TRAINING_LOG_FILE

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one event; the file is closed in between, so that a reader sees whole lines."""
        if state.is_world_process_zero and logs:
            event = {"step": state.global_step, "epoch": state.epoch, "time": time.time(), **logs}
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(_line(event))


def read_events(file: Path) -> list[dict[str, Any]]:
    """The events of a training log, [] without one; a line that was cut off by a crash or damaged is skipped."""
    if not file.is_file():
        return []
    return [event for event in read_json_lines(file) if event and is_step(event.get("step"))]


def write_events(file: Path, events: Iterable[dict[str, Any]]) -> None:
    """Replace the log atomically by these events; an empty list removes the file."""
    lines = [_line(event) for event in events]
    if not lines:
        file.unlink(missing_ok=True)
        return
    replace_text(file, "".join(lines))


def _line(event: dict[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in event.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"
