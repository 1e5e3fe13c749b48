"""The rows that cannot be used: how many may be, and what makes them usable."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeVar

from entrypoints.dataset.examples import Example, SkippedRow
from entrypoints.errors import UserError

Value = TypeVar("Value")


class SkippedRows:
    """Counts skipped rows by reason. `least`: by flag, the smallest limit in tokens that holds all that exceed it."""

    def __init__(self, rows: Iterable[SkippedRow] = ()) -> None:
        self.first: SkippedRow | None = None
        self.reasons: Counter[str] = Counter()
        self.least: dict[str, int] = {}
        self._too_long = 0
        for row in rows:
            self.add(row)

    def add(self, row: SkippedRow) -> None:
        """Count a row."""
        self.first = self.first or row
        self.reasons[row.reason] += 1
        if row.least:
            flag, tokens = row.least
            self.least[flag] = max(tokens, self.least.get(flag, 0))
            self._too_long += 1

    @property
    def total(self) -> int:
        """All of them."""
        return self.reasons.total()

    def counts(self) -> str:
        """The number by reason, the most frequent one first."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.most_common())

    def fix(self) -> str:
        """What makes them usable."""
        limits = " and ".join(f"{flag} {tokens}" for flag, tokens in self.least.items())
        if not limits:
            return "fix them"
        return f"set {limits}" if self._too_long == self.total else f"fix them and set {limits}"

    def check(self, max_skipped: int | None) -> None:
        """Raise UserError if there are more than allowed; names the first one."""
        if self.first is None or max_skipped is None or self.total <= max_skipped:
            return
        counts = f" ({self.counts()})" if len(self.reasons) > 1 else ""
        rows = "1 row" if self.total == 1 else f"{self.total:,} rows"
        raise UserError(
            f"{self.first.file}:{self.first.line}: {self.first.reason}; {rows} cannot be used{counts}",
            f"{self.fix()}, or allow them with --max-skipped {self.total}",
        )


def usable_rows(
    rows: Iterable[Example], skipped: Iterable[SkippedRow], convert: Callable[[Example], Value], max_skipped: int | None
) -> tuple[list[Value], list[SkippedRow]]:
    """What `convert` makes of the rows, and all skipped rows: `skipped`, then those that it rejects with a UserError.

    Raises UserError: more skipped rows than `max_skipped`, or no usable row.
    """
    values: list[Value] = []
    skipped = list(skipped)
    for row in rows:
        try:
            values.append(convert(row))
        except UserError as error:
            skipped.append(SkippedRow.of_error(row, error))
    counted = SkippedRows(skipped)
    if counted.first and not values:
        raise UserError(f"no usable row in {counted.first.file.name}: {counted.counts()}", counted.fix())
    counted.check(max_skipped)
    return values, skipped
