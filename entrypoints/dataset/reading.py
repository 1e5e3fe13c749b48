"""Rows and examples from a file of JSON objects: its content decides how it is read, never its suffix or the locale.

`read_rows` holds a whole file (100,000 rows take under a second), `stream_rows` a piece of it at a time, for files
larger than the memory. Knows no model and no tokenizer.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from entrypoints.dataset.columns import Columns, conversation, history, problem
from entrypoints.dataset.scanning import SHAPES, Pieces, Row, Scanner, decode
from entrypoints.errors import UserError
from entrypoints.prompt import Message, as_messages

EARLY = 1000  # rows by which a column that every row needs must have been seen


@dataclass(frozen=True, slots=True)
class Example:
    """A usable row; `index` counts the rows of its file from 0, skipped ones too; history is (question, answer).

    turns: all messages of a conversation, the answer too; prompt and response are then the last texts of its kind.
    """

    file: Path
    line: int
    index: int
    prompt: str
    response: str
    history: list[tuple[str, str]] = field(default_factory=list)
    turns: list[Message] = field(default_factory=list)

    def messages(self) -> list[Message]:
        """Every turn, the answer last."""
        asked = [*self.history, Message("user", self.prompt), Message("assistant", self.response)]
        return self.turns or as_messages(asked)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that cannot be learnt from, and why; the first reason where there are several."""

    file: Path
    line: int
    reason: str


def read_rows(path: Path, encoding: str = "utf-8") -> list[Row]:
    """Every row of a file, in its order; a byte order mark and blank lines do not matter.

    Raises UserError: no such file, a folder, unreadable, or anything `parse_rows` refuses.
    """
    with _opened(path) as stream:
        return parse_rows(stream.read(), path, encoding)


def stream_rows(path: Path, encoding: str = "utf-8") -> Iterator[Row]:
    """The rows of `read_rows` one by one; never more of the file is in memory than a piece, or its longest row."""
    with _opened(path) as stream:
        pieces = Pieces(stream, path, encoding)
        empty = True
        for row in Scanner("", path, pieces.text).rows():
            empty = False
            yield row
    if empty:
        raise UserError(f"{path} holds no rows" if pieces.offset else f"{path} is empty", SHAPES)


def _opened(path: Path) -> BinaryIO:
    if path.is_dir():
        raise UserError(f"{path} is a folder", "name a file in it, such as train.json")
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}", "check the path") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "check its permissions") from error


def parse_rows(data: bytes, file: Path, encoding: str = "utf-8") -> list[Row]:
    """Every row in the bytes of a file; `file` only names it in rows and errors.

    Raises UserError with file, line and column: undecodable bytes, malformed JSON, a row that is no object, no row.
    """
    rows = list(Scanner(decode(data, file, encoding), file).rows())
    if not rows:
        raise UserError(f"{file} is empty" if not data else f"{file} holds no rows", SHAPES)
    return rows


def column_counts(rows: list[Row]) -> dict[str, int]:
    """How many rows have each column, in the order the columns first appear."""
    return dict(Counter(column for row in rows for column in row.fields))


def examples(rows: list[Row], columns: Columns, strict: bool = False) -> tuple[list[Example], list[Skipped]]:
    """Split rows into usable examples and skipped rows; together they are all the rows, in order.

    No, null or [] in the history column means: no history.
    Raises UserError: a column that no row has, no usable row at all, with `strict` also a single skipped row.
    """
    _require_columns(rows, columns)
    used, skipped = [], []
    position = Counter()  # of the next row, for each file
    for row in rows:
        reason = problem(row.fields, columns)
        if reason:
            skipped.append(Skipped(row.file, row.line, reason))
        else:
            used.append(_example(row, position[row.file], columns))
        position[row.file] += 1
    if skipped and (strict or not used):
        counts = ", ".join(
            f"{count} {reason}" for reason, count in Counter(row.reason for row in skipped).most_common()
        )
        found = f"{len(skipped)} of {len(rows)} rows" if used else "no usable row"
        raise _unusable(found, rows[0].file, f"{counts} (first in line {skipped[0].line})", columns)
    return used, skipped


def require_columns(path: Path, encoding: str, columns: Columns) -> None:
    """Raise UserError when the first rows of a file have not the columns; a history may come later than those."""
    present, seen = Counter(), 0
    for seen, row in enumerate(itertools.islice(stream_rows(path, encoding), EARLY), start=1):  # noqa: B007
        present.update(row.fields.keys())
    if seen == EARLY:
        columns = Columns(columns.prompt, columns.response, None, columns.conversations)
    _require(present, columns, path)


def stream_examples(rows: Iterable[Row], columns: Columns) -> Iterator[Example | Skipped]:
    """What `examples` finds, row by row, without a list of them.

    Raises UserError at the end: a column that no row had, or no usable row.
    """
    present, reasons = Counter(), Counter()
    for position, row in enumerate(rows):
        present.update(row.fields.keys())
        reason = problem(row.fields, columns)
        reasons[reason] += 1
        yield Skipped(row.file, row.line, reason) if reason else _example(row, position, columns)
    _require(present, columns, row.file)
    if not reasons[None]:
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common() if reason)
        raise _unusable("no usable row", row.file, counts, columns)


def _unusable(found: str, file: Path, counts: str, columns: Columns) -> UserError:
    return UserError(
        f"{found} in {file.name}: {counts}", f"mend the rows or name other columns with {' and '.join(columns.flags())}"
    )


def _example(row: Row, index: int, columns: Columns) -> Example:
    if columns.conversations is not None:
        turns = conversation(row.fields, columns.conversations)
        asked = [turn.content for turn in turns if turn.role == "user"]
        return Example(row.file, row.line, index, asked[-1] if asked else "", turns[-1].content, turns=turns)
    pairs = [(question, answer) for question, answer in history(row.fields, columns)]
    return Example(row.file, row.line, index, row.fields[columns.prompt], row.fields[columns.response], pairs)


def _require_columns(rows: list[Row], columns: Columns) -> None:
    if not rows:
        raise UserError("there are no rows", "name a file that holds some")
    _require(column_counts(rows), columns, rows[0].file)


def _require(present: Iterable[str], columns: Columns, file: Path) -> None:
    missing = {flag: name for flag, name in columns.flags().items() if name not in present}
    if missing:
        names = " and ".join(f"no column {name!r}" for name in missing.values())
        raise UserError(
            f"{names} in {file.name}; columns: {', '.join(present)}",
            f"name the right one with {' and '.join(missing)}",
        )
