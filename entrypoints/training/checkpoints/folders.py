"""What a checkpoint of a run is: a folder checkpoint-N with a record of its files, all of which are there.

Rotation, --resume, reports, the training page and export ask this module, which imports nothing heavy. The record,
`checkpoint.json`, holds size and SHA-256 of every file, the settings of the run, its position in the rows, the
number of the save and the validation loss.
"""

import contextlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entrypoints.checkpoint.adapter_config import CHECKPOINT_NAME
from entrypoints.checkpoint.manifest import FileEntry, sha256
from entrypoints.errors import UserError
from entrypoints.file_writing import write_json
from entrypoints.training.output_files import LATEST_FILE, STATE_FILE
from entrypoints.untrusted import confined_path, read_json_file

RECORD_FILE = "checkpoint.json"
HASHING_THREADS = 8
INCOMPLETE_REMEDY = "name a complete checkpoint-N, or use --resume auto"
DAMAGED_REMEDY = "resume from another checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    run_config: settings of the run that wrote it. sequence: the number of this save in its output folder, by which the
    newest one is found: after going back to an earlier checkpoint, a lower step is newer than a higher one.
    """

    folder: Path
    step: int
    run_config: dict[str, Any] = field(default_factory=dict)
    sequence: int = 0
    eval_loss: float | None = None
    position: Any = None  # see position.py


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """The folders named checkpoint-N in an output directory, complete or not, by number."""
    numbers = {}
    for folder in output_dir.glob("checkpoint-*"):
        match = CHECKPOINT_NAME.fullmatch(folder.name)
        if match and folder.is_dir():
            numbers[folder] = int(match[1])
    return sorted(numbers, key=lambda folder: numbers[folder])


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, or has just been removed."""
    try:
        return not any(folder.iterdir())
    except OSError:
        return True


def list_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """The complete checkpoints in an output directory, in the order in which they were written."""
    found = []
    for folder in checkpoint_folders(output_dir):
        with contextlib.suppress(OSError, UserError):  # the run may remove it while another process looks
            if not find_problem(folder):
                found.append(open_record(folder))
    return sorted(found, key=lambda checkpoint: (checkpoint.sequence, checkpoint.step))


def best_checkpoint(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """The checkpoint with the lowest validation loss, the first of equal ones; None if none was evaluated.

    Losses on other validation rows than those of the newest evaluated checkpoint do not count.
    """
    evaluated = [checkpoint for checkpoint in checkpoints if checkpoint.eval_loss is not None]
    rows = evaluated[-1].run_config.get("validation_rows") if evaluated else None
    comparable = [one for one in evaluated if one.run_config.get("validation_rows") == rows]
    return min(comparable, key=lambda checkpoint: checkpoint.eval_loss or 0.0, default=None)


def open_record(folder: Path) -> Checkpoint:
    """A checkpoint that has no problem."""
    record = _read_record(folder)
    match = CHECKPOINT_NAME.fullmatch(folder.name)
    step = record.get("step")
    if step is None:  # older versions did not record it
        step = int(match[1]) if match else read_json_file(folder / STATE_FILE, DAMAGED_REMEDY)["global_step"]
    rest = {name: record[name] for name in ("sequence", "eval_loss", "position") if name in record}
    return Checkpoint(folder, step, record["made_with"], **rest)


def find_problem(folder: Path, hashes: bool = False) -> str | None:
    """Why the folder is not a complete checkpoint; None if it is.

    hashes: compare the contents of all files as well, and not only their sizes.
    """
    if not folder.is_dir():
        return "folder not found"
    for name in (RECORD_FILE, STATE_FILE):
        if not (folder / name).is_file():
            return f"{name} is missing"
    try:
        record = _read_record(folder)
        dict(record["made_with"])
        if any(not isinstance(record.get(name, 0), int) for name in ("step", "sequence")):
            raise TypeError("a number is expected")
        if not isinstance(record.get("eval_loss"), int | float | None):
            raise TypeError("a number is expected")
        float(record.get("eval_loss") or 0.0)
        entries = {name: _file_entry(entry) for name, entry in dict(record["files"]).items()}
        files = {name: confined_path(folder, name, RECORD_FILE) for name in entries}
    except (UserError, ValueError, KeyError, TypeError, OSError, OverflowError):
        return f"{RECORD_FILE} is damaged"
    return _find_file_problem(files, entries) or (_find_damage(folder, files, entries) if hashes else None)


def describe_files(folder: Path, known: Mapping[str, FileEntry]) -> dict[str, FileEntry]:
    """Size and SHA-256 of every file in the folder; those in `known` are not hashed again."""
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    hashes = _hash_all([file for name, file in files.items() if name not in known])
    return {
        name: known[name] if name in known else {"size": file.stat().st_size, "sha256": hashes[file]}
        for name, file in files.items()
    }


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a checkpoint."""
    write_json(folder / RECORD_FILE, record)


def _find_file_problem(files: Mapping[str, Path], entries: Mapping[str, tuple[int, str | None]]) -> str | None:
    for name, file in files.items():
        try:
            size = file.stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != entries[name][0]:
            return f"{name} has {size} bytes, not {entries[name][0]}"
    if "optimizer.pt" not in files and LATEST_FILE not in files:
        return "it holds a model without the state of the optimizer"
    return None


def _find_damage(folder: Path, files: Mapping[str, Path], entries: Mapping[str, tuple[int, str | None]]) -> str | None:
    hashed = {name: file for name, file in files.items() if entries[name][1] is not None}
    actual = _hash_all(list(hashed.values()))
    for name, file in hashed.items():
        if actual[file] != entries[name][1]:
            return f"{name} does not match its SHA-256"
    try:
        state = read_json_file(folder / STATE_FILE)
    except (UserError, ValueError):
        state = None
    return None if isinstance(state, dict) else f"{STATE_FILE} is damaged"


def _hash_all(files: list[Path]) -> dict[Path, str]:
    """SHA-256 of the files, several at once: a checkpoint of a 6B model has 75 GB."""
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return dict(zip(files, pool.map(sha256, files), strict=True))


def _read_record(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = read_json_file(folder / RECORD_FILE, DAMAGED_REMEDY)
    return record


def _file_entry(entry: Any) -> tuple[int, str | None]:
    """Size and hash; older versions recorded the size alone."""
    return (entry, None) if isinstance(entry, int) else (int(entry["size"]), str(entry["sha256"]))
