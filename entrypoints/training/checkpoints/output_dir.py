"""The output folder at the start of a run: cleared, or what is later than the resumed checkpoint is set aside.

A branch is a sequence of checkpoints, each continued from the one before. An output folder holds one branch: going back
to an earlier checkpoint starts another one, and the later checkpoints, log rows and result are moved away, not deleted,
and never mixed with what the new branch writes.
"""

import itertools
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrypoints.checkpoint import native
from entrypoints.checkpoint.adapter_config import CONFIG_FILE
from entrypoints.checkpoint.adapters import PREFIX_FILE
from entrypoints.checkpoint.lora import LORA_FILE
from entrypoints.checkpoint.manifest import MANIFEST_FILE, check_manifest
from entrypoints.checkpoint.native import TEMPLATE_FILE
from entrypoints.checkpoint.prompt_file import PROMPT_FILE
from entrypoints.errors import UserError
from entrypoints.file_writing import indented_json, replace_text
from entrypoints.training.checkpoints.folders import Checkpoint, checkpoint_folders, is_empty
from entrypoints.training.checkpoints.store import PARTIAL
from entrypoints.training.checkpoints.training_log import read_events, write_events
from entrypoints.training.methods.continued_adapter import ENCODER_FILE
from entrypoints.training.output_files import (
    CONTINUED_FILES,
    FINISHED_FILE,
    PROBE_FILE,
    RUN_FILES,
    STATE_FILE,
    TRAINING_LOG_FILE,
)
from entrypoints.untrusted import read_json_file

logger = logging.getLogger(__name__)
SET_ASIDE = "set-aside-{}"  # folder in the output folder
ADAPTER_FILES = (CONFIG_FILE, LORA_FILE, PREFIX_FILE, ENCODER_FILE, PROMPT_FILE, TEMPLATE_FILE)


def result_files(folder: Path) -> list[Path]:
    """The model files of a finished run of any method, without logs and checkpoints."""
    names = dict.fromkeys((*(file.name for file in native.model_files(folder)), *ADAPTER_FILES, MANIFEST_FILE))
    return [folder / name for name in names if (folder / name).is_file()]


def prepare_output_dir(folder: Path, resumed: Checkpoint | None) -> None:
    """Leave only what the run continues; the last step of a preparation: no user error can stop the run any more."""
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    if resumed:
        _set_later_aside(folder, resumed)
        for name in RUN_FILES:
            if name not in CONTINUED_FILES:
                (folder / name).unlink(missing_ok=True)
        return
    for old in checkpoint_folders(folder):
        shutil.rmtree(old)
    for file in (*result_files(folder), *(folder / name for name in RUN_FILES)):
        file.unlink(missing_ok=True)


def _set_later_aside(folder: Path, resumed: Checkpoint) -> None:
    is_inside = resumed.folder.parent.resolve() == folder.resolve()  # the folder itself may be a link to another disk
    first = resumed.step + 1 if is_inside else 0  # a checkpoint of another folder continues nothing in this one
    checkpoints = _later_checkpoints(folder, resumed.folder, first)
    result: list[Path] = []
    if _result_step(folder) >= first:
        result = [*result_files(folder), *(folder / name for name in RUN_FILES if name not in CONTINUED_FILES)]
    log = folder / TRAINING_LOG_FILE
    events = read_events(log)
    if checkpoints or result:
        target = next(path for number in itertools.count(1) if not (path := folder / SET_ASIDE.format(number)).exists())
        target.mkdir()
        for path in (*checkpoints, *(file for file in result if file.exists())):
            path.rename(target / path.name)
        later = [event for event in events if event["step"] >= first]
        write_events(target / TRAINING_LOG_FILE, later)
        names = [*(path.name for path in checkpoints), *(["the result"] if result else []), f"{len(later)} log rows"]
        logger.warning("continuing from step %d: moved %s to %s", resumed.step, ", ".join(names), target)
    if not is_inside:
        events = read_events(resumed.folder.parent / TRAINING_LOG_FILE)
        _copy_probe(resumed.folder.parent, folder)
    write_events(log, [event for event in events if event["step"] <= resumed.step])


def _copy_probe(source: Path, folder: Path) -> None:
    """The probe of the run that is continued, in place of that of the run in the folder."""
    (folder / PROBE_FILE).unlink(missing_ok=True)
    if (source / PROBE_FILE).is_file():
        shutil.copyfile(source / PROBE_FILE, folder / PROBE_FILE)


def _later_checkpoints(folder: Path, resumed: Path, first: int) -> list[Path]:
    """The checkpoints from step `first` on, complete or not; empty folders are removed."""
    found = []
    for other in checkpoint_folders(folder):
        if other.resolve() == resumed.resolve() or int(other.name.rpartition("-")[2]) < first:
            continue
        if is_empty(other):
            other.rmdir()
        else:
            found.append(other)
    return found


@dataclass(frozen=True)
class FinishedRun:
    """A finished run in an output folder: its last step, where it ended in the rows, and its settings."""

    step: int
    position: Any
    run_config: dict[str, Any]


def write_finished(folder: Path, finished: FinishedRun) -> None:
    """Mark the run in the folder as finished, after everything else is written."""
    fields = {"step": finished.step, "position": finished.position, "made_with": finished.run_config}
    replace_text(folder / FINISHED_FILE, indented_json(fields) + "\n")


def read_finished(folder: Path) -> FinishedRun | None:
    """The finished run in the folder, if there is one and its result is still there."""
    try:
        saved = read_json_file(folder / FINISHED_FILE)
        check_manifest(folder, hashes=False)
        return FinishedRun(int(saved["step"]), saved["position"], dict(saved["made_with"]))
    except (OSError, UserError, ValueError, KeyError, TypeError):
        return None


def _result_step(folder: Path) -> int:
    """The step of the finished run in the folder, -1 without one."""
    try:
        return int(read_json_file(folder / STATE_FILE)["global_step"])
    except (OSError, UserError, ValueError, KeyError, TypeError):
        return -1
