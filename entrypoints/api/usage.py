"""Usage by API key: an append-only ledger with one line per finished request, and today's totals, which quotas count.

A day is a day in UTC and has its own file, `usage-2026-11-30.jsonl`. A line is written with one system call before the
response ends, so it survives the death of the process. A request never fails because of the ledger: while the disk is
full, lines are kept in memory and counted, the log says so, and they are written when the disk works again.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

from entrypoints.errors import UserError
from entrypoints.untrusted import read_json_lines

logger = logging.getLogger(__name__)
KEEP_DAYS = 400  # older files are deleted
MAX_UNWRITTEN = 100_000  # lines in memory while the disk does not work; further lines replace the oldest
REMEDY = "choose a folder that this user can write: --usage-dir"


@dataclass(frozen=True)
class UsageRecord:
    """One finished request; `time` is its end in UTC.

    outcome: completed, aborted (by the client or a shutdown) or failed (by the engine). A prompt counts from the moment
    that the engine gets it, the response as far as it was generated.
    """

    time: str
    id: str
    key: str
    model: str
    outcome: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens of prompt and response."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def day(self) -> str:
        """The day of the end, as 2026-11-30."""
        return self.time[:10]


def utc_now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


class UsageLedger:
    """Totals of today by key, and their ledger in `folder` (None: totals only). Belongs to one thread."""

    def __init__(self, folder: Path | None = None, now: Callable[[], datetime] = utc_now) -> None:
        """Lock the folder and read the totals of today.

        Raises UserError: the folder cannot be written, or another server uses it.
        """
        self.folder = folder
        self.lost = 0  # lines that were replaced while they waited
        self._now = now
        self._day = now().date()
        self._tokens: Counter[str] = Counter()
        self._unwritten: deque[UsageRecord] = deque()
        self._file: _DayFile | None = None
        self._lock = _lock(folder) if folder else None
        if folder:
            self._tokens = Counter(tokens_by_key(folder, self._day))
            self._remove_old_files()

    @property
    def unwritten(self) -> int:
        """Lines that wait for the disk."""
        return len(self._unwritten)

    def tokens_today(self, key: str) -> int:
        """Tokens of the requests of a key that finished today."""
        self._start_day()
        return self._tokens[key]

    def next_day(self) -> datetime:
        """When the totals start from zero."""
        return datetime.combine(self._now().date() + timedelta(days=1), time(), UTC)

    def seconds_to_next_day(self) -> float:
        """Seconds until `next_day`."""
        return (self.next_day() - self._now()).total_seconds()

    def timestamp(self) -> str:
        """The time for a record."""
        return self._now().isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def add(self, record: UsageRecord) -> None:
        """Count a finished request and write its line. Never raises for the disk."""
        self._start_day()
        self._tokens[record.key] += record.tokens
        if self.folder is None:
            return
        if len(self._unwritten) >= MAX_UNWRITTEN:
            self._unwritten.popleft()
            self.lost += 1
        self._unwritten.append(record)
        waited = len(self._unwritten) > 1
        try:
            self._write()
        except OSError as error:
            self._close_file()
            if not waited:
                problem = "usage is kept in memory until it can be written to %s (%s); requests continue"
                logger.error(problem, self.folder, error.strerror)
        else:
            if waited:
                logger.warning("usage is written to %s again", self.folder)

    def close(self) -> None:
        """Write what waits, and release the folder."""
        try:
            self._write()
        except OSError as error:
            logger.error("%d lines of usage are lost: %s cannot be written (%s)", self.unwritten, self.folder, error)
        self._close_file()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _write(self) -> None:
        """Append the lines that wait, each to the file of its day. Raises OSError."""
        while self.folder and self._unwritten:
            record = self._unwritten[0]
            path = day_file(self.folder, record.day)
            if self._file is None or self._file.path != path:
                self._close_file()
                self._file = _DayFile(path)
            self._file.append(json.dumps(asdict(record), ensure_ascii=False).encode() + b"\n")
            self._unwritten.popleft()

    def _close_file(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def _start_day(self) -> None:
        today = self._now().date()
        if today != self._day:
            self._day, self._tokens = today, Counter()
            self._remove_old_files()

    def _remove_old_files(self) -> None:
        oldest = str(self._day - timedelta(days=KEEP_DAYS))
        for file in day_files(self.folder) if self.folder else ():
            if _day_of(file) < oldest:
                logger.info("usage of more than %d days ago: removing %s", KEEP_DAYS, file)
                with contextlib.suppress(OSError):
                    file.unlink()


class _DayFile:
    """The open file of one day."""

    def __init__(self, path: Path) -> None:
        """Open it for appending; a line that an earlier crash cut short is ended. Raises OSError."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        size = os.fstat(self._descriptor).st_size
        try:
            if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
                os.write(self._descriptor, b"\n")
        except OSError:
            self.close()
            raise

    def append(self, line: bytes) -> None:
        """Write a line whole or not at all. Raises OSError."""
        size = os.fstat(self._descriptor).st_size
        written = os.write(self._descriptor, line)
        if written < len(line):  # the disk is full
            os.ftruncate(self._descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)


def day_file(folder: Path, day: str) -> Path:
    """The ledger of a day."""
    return folder / f"usage-{day}.jsonl"


def day_files(folder: Path) -> list[Path]:
    """All ledgers of a folder, the oldest first."""
    return sorted(folder.glob("usage-????-??-??.jsonl"))


def read_records(file: Path) -> Iterator[UsageRecord | None]:
    """The records of a ledger; None for each line that is not one, such as a line that a crash cut short.

    Raises OSError.
    """
    for values in read_json_lines(file):
        yield _record(values) if values is not None else None


def _record(values: dict[str, Any]) -> UsageRecord | None:
    try:
        record = UsageRecord(**{field.name: values[field.name] for field in fields(UsageRecord)})
    except KeyError:
        return None
    texts = (record.time, record.id, record.key, record.model, record.outcome)
    counts = (record.prompt_tokens, record.completion_tokens)
    is_valid = all(type(text) is str for text in texts) and all(type(count) is int for count in counts)
    return record if is_valid and type(record.seconds) in (int, float) else None


def tokens_by_key(folder: Path, day: date) -> dict[str, int]:
    """Tokens of each key on one day. Raises UserError if the ledger cannot be read."""
    totals: Counter[str] = Counter()
    file = day_file(folder, str(day))
    try:
        for record in read_records(file) if file.exists() else ():
            if record:
                totals[record.key] += record.tokens
            else:
                logger.warning("%s has a line that is not a record; it is not counted", file)
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror})", REMEDY) from error
    return totals


def _lock(folder: Path) -> int:
    """Create the folder and lock it for this process; the descriptor of the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise UserError(f"cannot write usage to {folder} ({error.strerror})", REMEDY) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise UserError(
            f"another server writes its usage to {folder}", "give each server its own --usage-dir"
        ) from error
    return descriptor


def _day_of(file: Path) -> str:
    return file.stem.removeprefix("usage-")
