"""Report on a file of training rows: lengths, truncation, duplicates and problems to fix before renting a GPU."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from entrypoints.chat_format.prompt import Message, split_answer
from entrypoints.chat_format.tool_calls import tool_format
from entrypoints.dataset.columns import Columns
from entrypoints.dataset.json_stream import Row
from entrypoints.dataset.reader import Example, SkippedRow, stream_examples
from entrypoints.errors import UserError
from entrypoints.families import CHATGLM3

UNK = "<UNK>"  # five plain characters in the public AdvertiseGen answers, which a fine-tuned model learns to generate
MAX_LISTED = 10  # line numbers listed for one finding
LINE_BITS = 40
DIGEST_BYTES = 16  # of the hash of a text; a collision is practically impossible


@dataclass(frozen=True)
class AffectedRows:
    """Number of rows with a finding, and the lines of the first 10, with their file if there are several."""

    count: int
    lines: list[int | str]

    def __str__(self) -> str:
        return f"{self.count}{_format_lines(self.lines, self.count)}"


@dataclass(frozen=True)
class RowGroups:
    """Groups of related rows: number of groups, rows in them, lines of the first 10 rows of the first 10 groups."""

    groups: int
    rows: int
    lines: list[list[int | str]]

    def __str__(self) -> str:
        if not self.groups:
            return "0"
        shown = "; ".join(", ".join(map(str, lines)) for lines in self.lines)
        more = "; …" if self.groups > len(self.lines) else ""
        return f"{self.rows} rows in {self.groups} groups (lines {shown}{more})"


@dataclass(frozen=True)
class Lengths:
    """Distribution of a length; percentiles are nearest-rank, so that each is the length of an actual row."""

    p50: int
    p90: int
    p99: int
    max: int
    mean: float

    def __str__(self) -> str:
        return f"p50 {self.p50}, p90 {self.p90}, p99 {self.p99}, max {self.max}, mean {self.mean}"


@dataclass(frozen=True)
class Report:
    """Findings for one file; lengths and limits are in `unit`, the length of a prompt includes its history."""

    file: str
    shape: str
    rows: int
    columns: dict[str, int]
    unused: dict[str, int]
    used: int
    skipped: dict[str, AffectedRows]
    unit: str
    prompt_length: Lengths
    response_length: Lengths
    max_source_length: int
    max_target_length: int
    cut_prompts: AffectedRows
    cut_responses: AffectedRows
    unk_responses: AffectedRows
    duplicates: RowGroups
    conflicts: RowGroups

    def as_dict(self) -> dict[str, Any]:
        """Values that can be serialized as JSON."""
        return asdict(self)

    def as_text(self) -> str:
        """Human-readable report, one finding per line."""
        skipped = [f"  skipped, {reason}: {places}" for reason, places in self.skipped.items()]
        note = "" if self.unit == "tokens" else " (pass --model to count tokens)"
        return "\n".join(
            [
                f"{self.file}: {self.rows} rows, {self.used} used, {self.rows - self.used} skipped",
                *skipped,
                f"read as {self.shape}: {self.rows:,} rows",
                "columns: " + _format_columns(self.columns),
                f"not used: {_format_columns(self.unused) or 'nothing'}",
                f"lengths are in {self.unit}{note}",
                f"  prompt: {self.prompt_length}",
                f"  response: {self.response_length}",
                f"prompts truncated at {self.max_source_length} {self.unit}: {self.cut_prompts}",
                f"responses truncated at {self.max_target_length} {self.unit}: {self.cut_responses}",
                f"responses with a literal {UNK}: {self.unk_responses}",
                f"exact duplicates: {self.duplicates}",
                f"same prompt, different responses: {self.conflicts}",
            ]
        )


def check(
    rows: Iterable[Row],
    columns: Columns,
    count_tokens: Callable[[Example], tuple[int, int]] | None,
    max_source_length: int,
    max_target_length: int,
) -> Report:
    """Check all rows of one file or folder.

    count_tokens: returns the lengths of prompt and answer; rows that it rejects with a UserError are skipped. If it is
    None, lengths are characters. Only numbers and a hash are kept of each row.
    Raises UserError: a column that no row has, or no usable row.
    """
    found = _Statistics()
    reader = stream_examples(found.observe(rows), columns)
    for row in reader:
        found.add(row, count_tokens or _count_characters)
    found.require_usable_rows()
    duplicates, conflicts = found.repeated_rows()
    return Report(
        file=str(found.file),
        shape=reader.shape.name,
        rows=found.rows,
        columns=dict(found.columns),
        unused=dict(reader.unused),
        used=len(found.places),
        skipped={reason: found.affected(places) for reason, places in found.skipped.items()},
        unit="tokens" if count_tokens else "characters",
        prompt_length=_lengths(found.prompts),
        response_length=_lengths(found.responses),
        max_source_length=max_source_length,
        max_target_length=max_target_length,
        cut_prompts=found.affected(found.places_above(found.prompts, max_source_length)),
        cut_responses=found.affected(found.places_above(found.responses, max_target_length)),
        unk_responses=found.affected(found.unk),
        duplicates=duplicates,
        conflicts=conflicts,
    )


class _Statistics:
    """Statistics of the rows so far; `places`, `prompts` and `responses` have one entry for each usable row.

    A place is the line of a row, and above LINE_BITS the number of its file.
    """

    def __init__(self) -> None:
        self.file, self.rows = Path(), 0
        self.columns: Counter[str] = Counter()
        self.places: list[int] = []
        self.prompts: list[int] = []  # lengths
        self.responses: list[int] = []
        self.unk: list[int] = []  # places, as below
        self.skipped: dict[str, list[int]] = {}  # by reason
        self._files: dict[Path, int] = {}
        self._by_question: dict[bytes, list[int]] = {}  # by hash
        self._by_row: dict[bytes, list[int]] = {}  # by hash of the question and hash of the answer

    def observe(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The same rows; counts each with its columns as it passes."""
        for row in rows:
            self.file, self.rows = row.file, self.rows + 1
            self.columns.update(row.fields.keys())
            yield row

    def add(self, row: Example | SkippedRow, lengths: Callable[[Example], tuple[int, int]]) -> None:
        """Add one row."""
        try:
            prompt, response = (0, 0) if isinstance(row, SkippedRow) else lengths(row)
        except UserError as error:
            row = SkippedRow.of_error(row, error)
        place = (self._files.setdefault(row.file, len(self._files)) << LINE_BITS) + row.line
        if isinstance(row, SkippedRow):
            self.skipped.setdefault(row.reason, []).append(place)
            return
        self.places.append(place)
        self.prompts.append(prompt)
        self.responses.append(response)
        if UNK in row.response:
            self.unk.append(place)
        before, answer = split_answer(row.messages())
        question = _digest(before)
        self._by_question.setdefault(question, []).append(place)
        self._by_row.setdefault(question + _digest(answer), []).append(place)

    def require_usable_rows(self) -> None:
        """Raises UserError: all rows were skipped."""
        if not self.places:
            counts = ", ".join(f"{len(places)} {reason}" for reason, places in self.skipped.items())
            raise UserError(f"no usable row in {self.file.name}: {counts}", "fix the rows, or increase the limits")

    def places_above(self, lengths: list[int], limit: int) -> list[int]:
        """Places of the usable rows longer than a limit."""
        return [place for place, length in zip(self.places, lengths, strict=True) if length > limit]

    def repeated_rows(self) -> tuple[RowGroups, RowGroups]:
        """Rows that are equal in all turns; then rows that are equal except for the answer."""
        answers = Counter(key[:DIGEST_BYTES] for key in self._by_row)
        equal = [places for places in self._by_row.values() if len(places) > 1]
        conflicts = [places for question, places in self._by_question.items() if answers[question] > 1]
        return self._row_groups(equal), self._row_groups(conflicts)

    def affected(self, places: list[int]) -> AffectedRows:
        """The number of rows at these places, and the first lines."""
        return AffectedRows(len(places), self._first_lines(places))

    def _row_groups(self, groups: list[list[int]]) -> RowGroups:
        return RowGroups(
            len(groups), sum(map(len, groups)), [self._first_lines(places) for places in groups[:MAX_LISTED]]
        )

    def _first_lines(self, places: list[int]) -> list[int | str]:
        files, mask = list(self._files), (1 << LINE_BITS) - 1
        if len(files) == 1:
            return list(places[:MAX_LISTED])
        return [f"{files[place >> LINE_BITS]}:{place & mask}" for place in places[:MAX_LISTED]]


def _count_characters(example: Example) -> tuple[int, int]:
    before, answer = split_answer(example.messages())
    return sum(len(tool_format(CHATGLM3).system_text(turn)) for turn in before), sum(
        len(turn.content) for turn in answer
    )


def _format_columns(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} in {count} rows" for name, count in counts.items())


def _digest(turns: list[Message]) -> bytes:
    return hashlib.blake2b(repr(turns).encode(), digest_size=DIGEST_BYTES).digest()


def _lengths(values: list[int]) -> Lengths:
    ordered = sorted(values)
    p50, p90, p99 = (ordered[math.ceil(share * len(ordered) / 100) - 1] for share in (50, 90, 99))
    return Lengths(p50, p90, p99, ordered[-1], round(sum(ordered) / len(ordered), 1))


def _format_lines(lines: list[int | str], count: int) -> str:
    if not lines:
        return ""
    more = ", …" if count > len(lines) else ""
    return f" ({'line' if count == 1 else 'lines'} {', '.join(map(str, lines))}{more})"
