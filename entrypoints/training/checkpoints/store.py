"""Atomic checkpoints: written to a temporary folder, recorded, renamed; and how a run finds the one to resume from.

Before a checkpoint is used, its files are compared with their hashes and its pickles are checked: loading a received or
altered file must not run code. What a checkpoint is, is defined in folders.py.
"""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entrypoints.checkpoint.atomic_files import read_safetensors_header, replace_folder
from entrypoints.checkpoint.manifest import MANIFEST_FILE, read_manifest
from entrypoints.checkpoint.pickle_files import check_pickle
from entrypoints.errors import UserError
from entrypoints.training.checkpoints.folders import (
    INCOMPLETE_REMEDY,
    RECORD_FILE,
    Checkpoint,
    best_checkpoint,
    checkpoint_folders,
    describe_files,
    find_problem,
    is_empty,
    list_checkpoints,
    open_record,
    write_record,
)
from entrypoints.training.checkpoints.trainer_state import read_trainer_state
from entrypoints.training.output_files import REJECTED_REMEDY, STATE_FILE, read_deepspeed_tag

logger = logging.getLogger(__name__)
PARTIAL = ".partial"  # subfolder of the output folder for what is being written
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
NEVER_READ = ("training_args.bin",)  # holds classes of transformers, for other tools


def publish(partial: Path, target: Path, record: Mapping[str, Any]) -> None:
    """Record every file of `partial`, sync it to disk and rename it to `target`; an older `target` is removed last.

    record: the fields of the record beside `files`: made_with, step, sequence, eval_loss.
    """
    hashed = read_manifest(partial)["files"] if (partial / MANIFEST_FILE).is_file() else {}
    files = describe_files(partial, hashed)
    write_record(partial, {**record, "files": files})
    for name in (*files, RECORD_FILE):
        with (partial / name).open("rb") as stream:
            os.fsync(stream.fileno())  # after a power failure, the renamed folder must not hold empty files
    replace_folder(target, partial)


def next_sequence(output: Path, resumed: Checkpoint | None) -> int:
    """The number of the first save of a run: higher than that of every checkpoint before it."""
    earlier = [*list_checkpoints(output), *([resumed] if resumed else [])]
    return 1 + max((checkpoint.sequence for checkpoint in earlier), default=0)


def remove_oldest(output: Path, keep: int | None) -> None:
    """Remove the checkpoints that were written first, beyond `keep`; None keeps all.

    The newest one and the one with the lowest validation loss stay in any case. Incomplete folders do not count.
    """
    complete = list_checkpoints(output)
    if keep is None or len(complete) <= keep:
        return
    best = best_checkpoint(complete)
    kept = complete[-keep:]
    if best and best not in kept:
        kept = [best, *complete[-max(keep - 1, 1) :]]
    for checkpoint in complete:
        if checkpoint not in kept:
            shutil.rmtree(checkpoint.folder, ignore_errors=True)


def find_checkpoint(resume: str | None, output: Path, hashes: bool = True) -> Checkpoint | None:
    """The checkpoint to resume from: the named folder, or with `auto` the newest complete one; None: start at step 0.

    hashes: compare all files with their SHA-256; False in a process whose launcher has done so. Raises UserError when a
    named folder is incomplete or damaged, when `auto` finds only such ones, or when a file of the checkpoint could run
    code.
    """
    if resume is None:
        return None
    if resume != "auto":
        problem = find_problem(Path(resume), hashes)
        if problem:
            raise UserError(f"--resume {resume}: {problem}", INCOMPLETE_REMEDY)
        return _open(Path(resume))
    complete = list_checkpoints(output)
    folders = [checkpoint.folder for checkpoint in complete]
    problems = [
        f"{folder.name}: {find_problem(folder)}"
        for folder in checkpoint_folders(output)
        if folder not in folders and not is_empty(folder)
    ]
    for problem in problems:
        logger.warning("skipped incomplete %s", problem)
    for checkpoint in reversed(complete):
        damage = find_problem(checkpoint.folder, hashes)
        if not damage:
            return _open(checkpoint.folder)
        problems.append(f"{checkpoint.folder.name}: {damage}")
        logger.warning("skipped damaged %s", problems[-1])
    if problems:
        raise UserError(
            f"no checkpoint in {output} is complete ({'; '.join(problems)})",
            "start from the first step: --overwrite-output-dir in place of --resume",
        )
    logger.info("no checkpoint in %s: starting at the first step", output)
    return None


def check_state_files(folder: Path) -> None:
    """Raise UserError naming a file of the checkpoint that is damaged or could run code; no state is loaded."""
    read_deepspeed_tag(folder)
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]  # another process may be converting there
        for file in (Path(parent, name) for name in sorted(names)):
            if file.suffix == ".safetensors":
                read_safetensors_header(file)
            elif file.suffix in PICKLE_SUFFIXES and file.name not in NEVER_READ:
                check_pickle(file, REJECTED_REMEDY)


def _open(folder: Path) -> Checkpoint:
    check_state_files(folder)
    read_trainer_state(folder / STATE_FILE)
    return open_record(folder)
