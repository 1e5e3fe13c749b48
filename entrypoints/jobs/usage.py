"""Print the usage that glm serve recorded: requests, tokens and time per day, key and model. Days are in UTC."""

import argparse
import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from entrypoints.errors import UserError
from entrypoints.settings import Settings

if TYPE_CHECKING:
    from entrypoints.api.usage import UsageRecord

logger = logging.getLogger(__name__)
DAY = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)


@dataclass
class Row:
    """The requests of one day, key and model; `requests` includes the aborted and the failed ones."""

    day: str
    key: str
    model: str
    requests: int = 0
    aborted: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    seconds: float = 0.0

    def add(self, record: "UsageRecord") -> None:
        """Count one request."""
        self.requests += 1
        self.aborted += record.outcome == "aborted"
        self.failed += record.outcome == "failed"
        self.prompt_tokens += record.prompt_tokens
        self.completion_tokens += record.completion_tokens
        self.total_tokens += record.tokens
        self.seconds += record.seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm usage`."""
    parser.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        help="folder of glm serve --usage-dir, or one that holds those of several servers",
    )
    parser.add_argument("--since", metavar="DAY", default="", help="first day, such as 2026-11-30")
    parser.add_argument("--until", metavar="DAY", default="", help="last day")
    parser.add_argument("--key", help="only this key")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Print one line per day, key and model.

    Raises UserError: a malformed day, or a folder without usage.
    """
    for flag, day in (("--since", args.since), ("--until", args.until)):
        if day and not _is_day(day):
            raise UserError(f"{flag} {day} is not a day", "write it as 2026-11-30")
    rows = _rows(_records(_files(args.folder)), args)
    if args.json:
        for row in rows:
            print(json.dumps(asdict(row), ensure_ascii=False))
    else:
        _print_table(rows)


def _files(folder: Path) -> list[Path]:
    """The ledgers in a folder and in the folders in it, which several servers write."""
    from entrypoints.api.usage import day_files

    folders = [folder, *sorted(each for each in folder.iterdir() if each.is_dir())] if folder.is_dir() else []
    files = [file for each in folders for file in day_files(each)]
    if not files:
        raise UserError(f"{folder} contains no usage", "name the folder of glm serve --usage-dir")
    return files


def _is_day(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return DAY.fullmatch(text) is not None  # other forms of ISO 8601 do not compare as texts


def _records(files: Iterable[Path]) -> Iterator["UsageRecord"]:
    """All records; lines that are not records are counted in a warning."""
    from entrypoints.api.usage import read_records

    for file in files:
        broken = 0
        try:
            for record in read_records(file):
                if record:
                    yield record
                else:
                    broken += 1
        except OSError as error:
            raise UserError(f"cannot read {file} ({error.strerror})", "check its permissions") from error
        if broken:
            logger.warning("%s has %d lines that are not records, for example cut short by a crash", file, broken)


def _rows(records: Iterable["UsageRecord"], args: argparse.Namespace) -> list[Row]:
    rows: dict[tuple[str, str, str], Row] = {}
    for record in records:
        if record.day < args.since or (args.until and record.day > args.until) or args.key not in (None, record.key):
            continue
        name = (record.day, record.key, record.model)
        rows.setdefault(name, Row(*name)).add(record)
    found = [rows[name] for name in sorted(rows)]
    for row in found:
        row.seconds = round(row.seconds, 3)
    return found


def _print_table(rows: list[Row]) -> None:
    """Aligned columns, with a total of several rows."""
    if len(rows) > 1:
        total = Row("total", "", "")
        for row in rows:
            for column in list(asdict(total))[3:]:
                setattr(total, column, getattr(total, column) + getattr(row, column))
        rows = [*rows, total]
    names = list(Row.__dataclass_fields__)
    lines = [names, *([f"{value:.1f}" if isinstance(value, float) else f"{value}" for value in asdict(row).values()]
                      for row in rows)]  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    for line in lines:
        texts = [text.ljust(width) for text, width in zip(line[:3], widths[:3], strict=True)]
        numbers = [text.rjust(width) for text, width in zip(line[3:], widths[3:], strict=True)]
        print("  ".join([*texts, *numbers]).rstrip())
