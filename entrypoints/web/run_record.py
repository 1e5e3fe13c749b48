"""What a training run has written so far: trainer_state.json, TensorBoard events, scores and predictions. Read only.

A file may be half written while it is read: what cannot be read now counts as not there yet.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

STATE_FILE = "trainer_state.json"
RESULTS_FILE = "train_results.json"
# The names are those of evaluation.py, which imports the engines; a test compares them.
PREDICTIONS_FILE = "generated_predictions.jsonl"
SCORES_FILE = "predict_results.json"
MOST_SAMPLES = 200
# TensorBoard names of the Trainer's callback, and ours
TAGS = {"train/": "", "eval/": "eval_"}


@dataclass
class RunRecord:
    """A run as it stands; `curves` maps a name such as loss to {step: value}, times are in seconds."""

    step: int = 0
    steps: int | None = None
    epoch: float | None = None
    finished: bool = False
    elapsed: float | None = None
    left: float | None = None
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)


def read_run(folder: Path) -> RunRecord | None:
    """The run in an --output-dir; None if nothing of one is there."""
    record, times = RunRecord(), {}
    for state, time in _states(folder):
        _add_state(record, state)
        times[state.get("global_step", 0)] = time
    for file in sorted(folder.glob("**/events.out.tfevents.*")):
        for step, name, value, time in read_events(_bytes(file)):
            record.curves.setdefault(name, {})[step] = value
            record.step = max(record.step, step)
            times[step] = time
    results = _json(folder / RESULTS_FILE)
    record.finished = bool(results)
    _add_times(record, times, results.get("train_runtime"))
    record.scores = {
        name: value for name, value in _json(folder / SCORES_FILE).items() if isinstance(value, int | float)
    }
    record.samples = list(islice(_samples(folder / PREDICTIONS_FILE), MOST_SAMPLES))
    record.checkpoints = [path.name for path in _checkpoints(folder)]
    return record if record.curves or record.scores or record.samples or record.step else None


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def _states(folder: Path) -> Iterator[tuple[dict, float]]:
    """States of the Trainer with the time each was written, the newest last."""
    for path in (*_checkpoints(folder), folder):
        if state := _json(path / STATE_FILE):
            yield state, (path / STATE_FILE).stat().st_mtime


def _add_state(record: RunRecord, state: dict) -> None:
    record.step = max(record.step, state.get("global_step", 0))
    record.steps = state.get("max_steps") or record.steps
    record.epoch = state.get("epoch", record.epoch)
    for entry in state.get("log_history", ()):
        for name, value in entry.items():
            if (
                name not in ("step", "epoch")
                and isinstance(value, int | float)
                and not name.startswith(("train_", "total_"))
            ):
                record.curves.setdefault(name, {})[entry["step"]] = value


def _add_times(record: RunRecord, times: dict[int, float], runtime: float | None) -> None:
    """Time left from the pace between the first and the last step whose time is known."""
    known = sorted(times.items())
    if runtime is not None:
        record.elapsed, record.left = runtime, 0.0
    elif len(known) > 1 and known[-1][0] > known[0][0]:
        pace = (known[-1][1] - known[0][1]) / (known[-1][0] - known[0][0])
        record.elapsed = pace * record.step
        record.left = pace * max(0, record.steps - record.step) if record.steps else None


def read_events(data: bytes) -> Iterator[tuple[int, str, float, float]]:
    """(step, name, value, unix time) of the scalars in a TensorBoard file; ends where it is cut off.

    The format is TFRecord: length (8 bytes), its checksum (4), an Event as protobuf, its checksum (4).
    """
    position = 0
    while position + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        event = data[position + 12 : position + 12 + length]
        position += 16 + length
        if position > len(data):
            return
        fields = dict(_protobuf(event))  # 1: wall_time, 2: step, 5: summary
        for _, value in _protobuf(fields.get(5, b"")):
            scalar = dict(_protobuf(value))  # 1: tag, 2: simple_value
            if 1 in scalar and 2 in scalar:
                name = scalar[1].decode("utf-8", "replace")
                for prefix, ours in TAGS.items():
                    if name.startswith(prefix):
                        (time,) = struct.unpack("<d", fields[1])
                        yield (
                            fields.get(2, 0),
                            ours + name.removeprefix(prefix),
                            struct.unpack("<f", scalar[2])[0],
                            time,
                        )


def _protobuf(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message; fixed-size values as their bytes."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        kind, size = key & 7, {1: 8, 5: 4}.get(key & 7)
        if kind == 0:
            value, position = _varint(message, position)
        else:
            if kind == 2:
                size, position = _varint(message, position)
            if size is None:  # no other kind is in use
                return
            value, position = message[position : position + size], position + size
        yield key >> 3, value


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value, shift = 0, 0
    while position < len(message):
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    return value, position


def _samples(file: Path) -> Iterator[dict[str, str]]:
    if not file.is_file():
        return
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            yield {name: str(row.get(name, "")) for name in ("prompt", "reference", "prediction")}


def _numbers(fields: dict) -> dict[str, float]:
    return {name: value for name, value in fields.items() if isinstance(value, int | float)}


def _json(file: Path) -> dict:
    try:
        found = json.loads(_bytes(file))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""
