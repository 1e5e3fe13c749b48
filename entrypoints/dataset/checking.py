"""What a file of training rows holds: lengths, what the limits would cut, and what to mend before paying for a GPU."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from entrypoints.dataset.reading import Columns, Example, Row, Skipped, stream_examples
from entrypoints.errors import UserError
from entrypoints.prompt import with_tools

UNK = (
    "<UNK>"  # the public AdvertiseGen answers hold it as five plain characters, and a tuned model learns to write them
)
SHOWN = 10  # line numbers named for one finding
DIGEST = 16  # bytes that stand for a text: enough that no two of any file are taken for equal


@dataclass(frozen=True)
class Places:
    """How many rows a finding concerns, and the lines of the first 10."""

    count: int
    lines: list[int]

    def __str__(self) -> str:
        return f"{self.count}{_lines(self.lines, self.count)}"


@dataclass(frozen=True)
class Groups:
    """Rows that belong together: how many groups, how many rows in them, lines of the first 10 rows of the first 10."""

    groups: int
    rows: int
    lines: list[list[int]]

    def __str__(self) -> str:
        if not self.groups:
            return "0"
        shown = "; ".join(", ".join(map(str, lines)) for lines in self.lines)
        more = "; …" if self.groups > len(self.lines) else ""
        return f"{self.rows} rows in {self.groups} groups (lines {shown}{more})"


@dataclass(frozen=True)
class Lengths:
    """Spread of a length: nearest-rank percentiles, so that each is the length of a real row."""

    p50: int
    p90: int
    p99: int
    max: int
    mean: float

    def __str__(self) -> str:
        return f"p50 {self.p50}, p90 {self.p90}, p99 {self.p99}, max {self.max}, mean {self.mean}"


@dataclass(frozen=True)
class Report:
    """Findings on one file; lengths and limits are in `unit`, a prompt's length includes its history."""

    file: str
    rows: int
    columns: dict[str, int]
    used: int
    skipped: dict[str, Places]
    unit: str
    prompt_length: Lengths
    response_length: Lengths
    max_source_length: int
    max_target_length: int
    cut_prompts: Places
    cut_responses: Places
    unk_responses: Places
    duplicates: Groups
    conflicts: Groups

    def as_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        return asdict(self)

    def as_text(self) -> str:
        """One finding a line, for people."""
        skipped = [f"  skipped, {reason}: {places}" for reason, places in self.skipped.items()]
        note = "" if self.unit == "tokens" else " (name a model to count its tokens)"
        return "\n".join(
            [
                f"{self.file}: {self.rows} rows, {self.used} used, {self.rows - self.used} skipped",
                *skipped,
                "columns: " + ", ".join(f"{name} in {count} rows" for name, count in self.columns.items()),
                f"lengths are in {self.unit}{note}",
                f"  prompt: {self.prompt_length}",
                f"  response: {self.response_length}",
                f"prompts cut at {self.max_source_length} {self.unit}: {self.cut_prompts}",
                f"responses cut at {self.max_target_length} {self.unit}: {self.cut_responses}",
                f"responses with a literal {UNK}: {self.unk_responses}",
                f"exact duplicates: {self.duplicates}",
                f"one prompt, different responses: {self.conflicts}",
            ]
        )


def check(
    rows: Iterable[Row],
    columns: Columns,
    encode: Callable[[Example], tuple[int, int]] | None,
    max_source_length: int,
    max_target_length: int,
) -> Report:
    """Look at every row of one file; `encode` gives prompt and answer length in tokens, without it characters count.

    Rows that `encode` refuses with a UserError are skipped. Of each row only numbers and a digest are kept.
    Raises UserError: a column that no row has, or no usable row.
    """
    found = _Findings()
    for row in stream_examples(found.counted(rows), columns):
        found.add(row, encode or _characters)
    if not found.lines:
        counts = ", ".join(f"{len(lines)} {reason}" for reason, lines in found.skipped.items())
        raise UserError(f"no usable row in {found.file.name}: {counts}", "mend the rows, or raise the limits")
    duplicates, conflicts = found.repeats()
    return Report(
        file=str(found.file),
        rows=found.rows,
        columns=dict(found.columns),
        used=len(found.lines),
        skipped={reason: _places(lines) for reason, lines in found.skipped.items()},
        unit="tokens" if encode else "characters",
        prompt_length=_lengths(found.prompts),
        response_length=_lengths(found.responses),
        max_source_length=max_source_length,
        max_target_length=max_target_length,
        cut_prompts=_places(found.longer(found.prompts, max_source_length)),
        cut_responses=_places(found.longer(found.responses, max_target_length)),
        unk_responses=_places(found.unk),
        duplicates=duplicates,
        conflicts=conflicts,
    )


class _Findings:
    """What is known of the rows so far; `lines`, `prompts` and `responses` have one entry for each usable row."""

    def __init__(self) -> None:
        self.file, self.rows, self.columns = Path(), 0, Counter()
        self.lines, self.prompts, self.responses = [], [], []
        self.unk: list[int] = []
        self.skipped: dict[str, list[int]] = {}
        self.whole: dict[bytes, list[int]] = {}  # digests of question and answer: lines
        self.asked: dict[bytes, list[int]] = {}  # of the question

    def counted(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The same rows; each is counted with its columns as it passes."""
        for row in rows:
            self.file, self.rows = row.file, self.rows + 1
            self.columns.update(row.fields.keys())
            yield row

    def add(self, row: Example | Skipped, size: Callable[[Example], tuple[int, int]]) -> None:
        """Note one row."""
        try:
            prompt, response = (0, 0) if isinstance(row, Skipped) else size(row)
        except UserError as error:
            row = Skipped(row.file, row.line, error.problem)
        if isinstance(row, Skipped):
            self.skipped.setdefault(row.reason, []).append(row.line)
            return
        self.lines.append(row.line)
        self.prompts.append(prompt)
        self.responses.append(response)
        if UNK in row.response:
            self.unk.append(row.line)
        *asked, answer = row.messages()
        question = _digest(asked)
        self.asked.setdefault(question, []).append(row.line)
        self.whole.setdefault(question + _digest(answer), []).append(row.line)

    def longer(self, sizes: list[int], limit: int) -> list[int]:
        """Lines of the usable rows above a limit."""
        return [line for line, size in zip(self.lines, sizes, strict=True) if size > limit]

    def repeats(self) -> tuple[Groups, Groups]:
        """Rows equal in all turns; then rows equal in all but the answer."""
        answers = Counter(key[:DIGEST] for key in self.whole)
        conflicts = [lines for question, lines in self.asked.items() if answers[question] > 1]
        return _groups([lines for lines in self.whole.values() if len(lines) > 1]), _groups(conflicts)


def _characters(example: Example) -> tuple[int, int]:
    *asked, answer = example.messages()
    return sum(len(with_tools(turn)) for turn in asked), len(answer.content)


def _digest(turns: object) -> bytes:
    return hashlib.blake2b(repr(turns).encode(), digest_size=DIGEST).digest()


def _lengths(sizes: list[int]) -> Lengths:
    ordered = sorted(sizes)
    p50, p90, p99 = (ordered[math.ceil(share * len(ordered) / 100) - 1] for share in (50, 90, 99))
    return Lengths(p50, p90, p99, ordered[-1], round(sum(ordered) / len(ordered), 1))


def _places(lines: list[int]) -> Places:
    return Places(len(lines), lines[:SHOWN])


def _groups(found: list[list[int]]) -> Groups:
    return Groups(len(found), sum(map(len, found)), [lines[:SHOWN] for lines in found[:SHOWN]])


def _lines(lines: list[int], count: int) -> str:
    if not lines:
        return ""
    more = ", …" if count > len(lines) else ""
    return f" ({'line' if count == 1 else 'lines'} {', '.join(map(str, lines))}{more})"
