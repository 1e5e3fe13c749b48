"""What a file of training rows holds: lengths, what the limits would cut, and what to mend before paying for a GPU."""

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from entrypoints.dataset.reading import Columns, Example, Row, Skipped, column_counts, examples

UNK = (
    "<UNK>"  # the public AdvertiseGen answers hold it as five plain characters, and a tuned model learns to write them
)
SHOWN = 10  # line numbers named for one finding


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
    rows: list[Row],
    columns: Columns,
    encode: Callable[[Example], tuple[int, int]] | None,
    max_source_length: int,
    max_target_length: int,
) -> Report:
    """Look at every row of one file; `encode` gives prompt and answer length in tokens, without it characters count.

    Raises UserError: a column that no row has, or no usable row.
    """
    used, skipped = examples(rows, columns)
    sizes = [(encode or _characters)(example) for example in used]
    prompts, responses = [size[0] for size in sizes], [size[1] for size in sizes]
    duplicates, conflicts = _repeats(used)
    return Report(
        file=str(rows[0].file),
        rows=len(rows),
        columns=column_counts(rows),
        used=len(used),
        skipped=_by_reason(skipped),
        unit="tokens" if encode else "characters",
        prompt_length=_lengths(prompts),
        response_length=_lengths(responses),
        max_source_length=max_source_length,
        max_target_length=max_target_length,
        cut_prompts=_places(used, (size > max_source_length for size in prompts)),
        cut_responses=_places(used, (size > max_target_length for size in responses)),
        unk_responses=_places(used, (UNK in example.response for example in used)),
        duplicates=duplicates,
        conflicts=conflicts,
    )


def _characters(example: Example) -> tuple[int, int]:
    history = sum(len(question) + len(answer) for question, answer in example.history)
    return history + len(example.prompt), len(example.response)


def _lengths(sizes: list[int]) -> Lengths:
    ordered = sorted(sizes)
    p50, p90, p99 = (ordered[math.ceil(share * len(ordered) / 100) - 1] for share in (50, 90, 99))
    return Lengths(p50, p90, p99, ordered[-1], round(sum(ordered) / len(ordered), 1))


def _places(used: list[Example], found: Iterable[bool]) -> Places:
    lines = [example.line for example, yes in zip(used, found, strict=True) if yes]
    return Places(len(lines), lines[:SHOWN])


def _by_reason(skipped: list[Skipped]) -> dict[str, Places]:
    lines = _grouped((row.reason, row.line) for row in skipped)
    return {reason: Places(len(found), found[:SHOWN]) for reason, found in lines.items()}


def _repeats(used: list[Example]) -> tuple[Groups, Groups]:
    """Rows equal in history, prompt and response; then rows equal in history and prompt that answer differently."""
    whole = _grouped(((tuple(row.history), row.prompt, row.response), row.line) for row in used)
    asked = _grouped(((tuple(row.history), row.prompt), row.line) for row in used)
    answers = _grouped(((history, prompt), response) for history, prompt, response in whole)
    conflicts = [lines for question, lines in asked.items() if len(answers[question]) > 1]
    return _groups([lines for lines in whole.values() if len(lines) > 1]), _groups(conflicts)


def _grouped(pairs: Iterable[tuple[Hashable, Any]]) -> dict[Any, list]:
    groups = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def _groups(found: list[list[int]]) -> Groups:
    return Groups(len(found), sum(map(len, found)), [lines[:SHOWN] for lines in found[:SHOWN]])


def _lines(lines: list[int], count: int) -> str:
    if not lines:
        return ""
    more = ", …" if count > len(lines) else ""
    return f" ({'line' if count == 1 else 'lines'} {', '.join(map(str, lines))}{more})"
