"""Checkpoints that are whole or not there: written beside their place, recorded, renamed; and the way back to one.

`checkpoint-N` holds what the Trainer and DeepSpeed write, what makes it a model folder, and `checkpoint.json`: how the
run was made up, and the size of every file. A folder without that record, or unlike it, is passed over.
"""

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from entrypoints.checkpoint.native import write_json
from entrypoints.errors import UserError

logger = logging.getLogger(__name__)
RECORD_FILE = "checkpoint.json"
PARTIAL = ".partial"  # in the output folder: what is being written


@dataclass(frozen=True)
class Checkpoint:
    """A complete one; `made_with` tells method, number of processes and ZeRO stage."""

    folder: Path
    step: int
    made_with: dict


def publish(partial: Path, target: Path, made_with: dict) -> None:
    """Record every file of `partial`, push it to the disk and rename it; an older `target` goes only then."""
    files = sorted(file for file in partial.rglob("*") if file.is_file())
    sizes = {file.relative_to(partial).as_posix(): file.stat().st_size for file in files}
    write_json(partial / RECORD_FILE, {"made_with": made_with, "files": sizes})
    for file in (*files, partial / RECORD_FILE):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())  # a rename that outlives a power cut must not name empty files
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def rotate(output: Path, keep: int | None) -> None:
    """Remove the oldest checkpoints beyond `keep`."""
    for folder in by_step(output)[: -keep if keep else 0]:
        shutil.rmtree(folder, ignore_errors=True)


def to_resume(resume: str | None, output: Path) -> Checkpoint | None:
    """The checkpoint to go on from: the named folder, or with `auto` the newest complete one; None to start anew.

    Raises UserError when a named folder is incomplete, or `auto` finds only incomplete ones.
    """
    if resume is None:
        return None
    if resume != "auto":
        fault = _fault(Path(resume))
        if fault:
            raise UserError(f"--resume {resume}: {fault}", "name a complete checkpoint-N, or use --resume auto")
        return _opened(Path(resume))
    faults = []
    for folder in reversed(by_step(output)):
        fault = _fault(folder)
        if not fault:
            return _opened(folder)
        faults.append(f"{folder.name}: {fault}")
        logger.warning("passed over %s", faults[-1])
    if faults:
        raise UserError(f"no checkpoint in {output} is complete ({'; '.join(faults)})", "start without --resume")
    logger.info("no checkpoint in %s: starting at the first step", output)
    return None


def by_step(output: Path) -> list[Path]:
    """The folders checkpoint-N, whole or not, the oldest first; others' names, as an export's, are none."""
    folders = [folder for folder in output.glob("checkpoint-*") if folder.is_dir() and _step(folder) is not None]
    return sorted(folders, key=_step)


def _step(folder: Path) -> int | None:
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else None


def _opened(folder: Path) -> Checkpoint:
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return Checkpoint(folder, state["global_step"], _record(folder)["made_with"])


def _record(folder: Path) -> dict:
    return json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))


def _fault(folder: Path) -> str | None:
    """What is wrong with it, None if it is complete."""
    if not folder.is_dir():
        return "no such folder"
    if not (folder / RECORD_FILE).is_file():
        return f"no {RECORD_FILE}"
    try:
        record = _record(folder)
        sizes = dict(record["files"])
        dict(record["made_with"])
    except (ValueError, KeyError, TypeError):
        return f"{RECORD_FILE} is damaged"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
    if "optimizer.pt" not in sizes and "latest" not in sizes:
        return "it holds a model without the state of the optimizer"
    return None
