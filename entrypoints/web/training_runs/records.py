"""Reading the files of a run that may be incomplete, damaged or written by another program.

What cannot be read counts as not written yet. A value of a wrong type is ignored and reported with its file and field.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entrypoints.untrusted import read_json_lines

MAX_FILE_BYTES = 64 << 20  # of each file, every few seconds
MAX_TAIL_BYTES = 64 << 10
MAX_COUNT = 1e12  # steps, epochs, tokens and seconds
MAX_VALUE = 1e300


@dataclass
class Record:
    """A JSON object of the file `name`; `problems` lists the fields of a wrong type that were asked for."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def number(self, name: str) -> float | None:
        """A number that a chart can show; None for null, NaN and anything else."""
        value = self.values.get(name)
        if value is None or value != value:  # NaN
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not -MAX_VALUE <= value <= MAX_VALUE:
            self.problems.append(name)
            return None
        return value

    def count(self, name: str) -> float | None:
        """A number of steps, epochs, tokens or seconds."""
        value = self.number(name)
        if value is None or 0 <= value <= MAX_COUNT:
            return value
        self.problems.append(name)
        return None

    def step(self, name: str = "step") -> int | None:
        """A number of optimizer steps."""
        value = self.count(name)
        return None if value is None else int(value)

    def text(self, name: str) -> str:
        """A text that can be shown; empty without one."""
        value = self.values.get(name)
        if value is None:
            return ""
        if isinstance(value, str):
            return showable(value)
        self.problems.append(name)
        return ""

    def texts(self, name: str) -> dict[str, str]:
        """An object as names and texts."""
        value = self.values.get(name)
        if value is None:
            return {}
        if isinstance(value, dict):
            return {showable(key): setting_text(entry) for key, entry in value.items()}
        self.problems.append(name)
        return {}


def read_record(file: Path) -> Record:
    """The object in a JSON file; without values if the file is missing or incomplete."""
    record = Record(file.name)
    try:
        values = json.loads(_read_end(file, MAX_FILE_BYTES))
    except (ValueError, RecursionError):
        return record
    if isinstance(values, dict):
        record.values = values
    else:
        record.problems.append("a JSON object is expected")
    return record


def read_records(file: Path) -> Iterator[Record]:
    """The objects of a JSON lines file, of a long one those at its end; other lines are skipped."""
    try:
        if file.is_file():  # a pipe may never end
            for values in read_json_lines(file, MAX_FILE_BYTES):
                if values:
                    yield Record(file.name, values)
    except (OSError, ValueError):
        return


def read_tail(file: Path, lines: int) -> str:
    """The last lines of a text file."""
    return showable("\n".join(_read_end(file, MAX_TAIL_BYTES).splitlines()[-lines:]))


def setting_text(value: object) -> str:
    """A setting as on the command line; a nested one as JSON."""
    if isinstance(value, list) and all(isinstance(entry, str | int | float) for entry in value):
        return showable(" ".join(map(str, value)))
    if isinstance(value, dict | list):
        return showable(json.dumps(value, ensure_ascii=False))
    return showable(f"{value}")


def showable(text: str) -> str:
    """The text without lone surrogates, which no browser can receive."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _read_end(file: Path, max_bytes: int) -> str:
    """Text of a file, the end of a long one; nothing that is not a file, such as a pipe, which may never end."""
    try:
        if not file.is_file():
            return ""
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - max_bytes))
            return stream.read(max_bytes).decode("utf-8", "replace")
    except (OSError, ValueError):  # ValueError: no path, such as one with a null character
        return ""
