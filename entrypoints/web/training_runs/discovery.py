"""The runs in a folder and below it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from entrypoints.training.output_files import RUN_STATUS_FILE, SCORES_FILE, STATE_FILE, TRAINING_LOG_FILE
from entrypoints.web.training_runs.records import showable

MAX_DEPTH = 3
MAX_RUNS = 200
MAX_FOLDERS = 5000  # that are looked into
RUN_FILES = (RUN_STATUS_FILE, TRAINING_LOG_FILE, STATE_FILE)  # each of them makes a folder a run
SKIPPED_PREFIXES = (".", "checkpoint-")  # hidden folders, parts of a run


@dataclass(frozen=True)
class Run:
    """A run: its folder, its path below the folder of the page as a name, and when it last wrote something."""

    folder: Path
    name: str
    modified: float


def find_runs(folder: Path) -> list[Run]:
    """The runs in the folder and up to MAX_DEPTH levels below it, the newest first; links are not followed."""
    found: list[Run] = []
    for number, (path, depth) in enumerate(_folders(folder)):
        if number >= MAX_FOLDERS or len(found) >= MAX_RUNS:
            break
        names = RUN_FILES if depth else (*RUN_FILES, SCORES_FILE)  # scores below a run are those of its base model
        times = [_modified(path / name) for name in names]
        if any(times):
            name = path.relative_to(folder).as_posix() if depth else path.name
            found.append(Run(path, showable(name), max(times)))
    return sorted(found, key=lambda run: (-run.modified, run.name))


def _folders(folder: Path) -> Iterator[tuple[Path, int]]:
    """The folder and those below it, level by level."""
    level = [folder]
    for depth in range(MAX_DEPTH + 1):
        for path in level:
            yield path, depth
        level = [child for path in level for child in _children(path)]


def _children(path: Path) -> list[Path]:
    try:
        with os.scandir(path) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (OSError, ValueError):
        return []
    return [path / name for name in sorted(names) if not name.startswith(SKIPPED_PREFIXES)]


def _modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except (OSError, ValueError):
        return 0.0
