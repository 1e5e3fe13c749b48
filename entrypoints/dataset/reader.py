"""Rows and examples from files. The content determines how a file is read, not its suffix or the locale.

`stream_rows` reads in chunks, for files larger than the memory, `read_rows` all at once. Independent of model and
tokenizer.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from entrypoints.dataset.columns import Columns
from entrypoints.dataset.examples import Example, RowConverter, SkippedRow
from entrypoints.dataset.json_stream import FORMAT_HINT, ChunkReader, Row, Scanner, decode
from entrypoints.dataset.preferences import PreferenceConverter
from entrypoints.dataset.row_files import expanded, ignored_files, kind_of_name, open_file, part_files, table_kind
from entrypoints.dataset.shapes import Shape, resolve
from entrypoints.dataset.skipped_rows import SkippedRows
from entrypoints.dataset.tables import csv_rows, table_rows
from entrypoints.errors import UserError

__all__ = ["Example", "ExampleReader", "SkippedRow", "examples", "read_rows", "stream_examples", "stream_rows"]
logger = logging.getLogger(__name__)
SAMPLE_ROWS = 10  # the shape of a file is that of most of them
HEAD_ROWS = 1000  # every required column must appear within these first rows
CHECKED_ROWS = 100_000  # checked before a model is looked for, which takes a second
TEXT_BLANKS = b"\xef\xbb\xbf\xff\xfe \t\r\n\0"  # byte order marks, and what may precede JSON


def read_rows(path: Path, encoding: str = "utf-8") -> list[Row]:
    """All rows of `stream_rows` in memory; 100,000 rows take less than a second."""
    return list(stream_rows(path, encoding))


def stream_rows(path: Path, encoding: str = "utf-8") -> Iterator[Row]:
    """The rows of a file, or of the parts of a folder or glob, one by one, in order; blank lines are ignored.

    Only one chunk of the file, or its longest row, is in memory.
    Raises UserError: names file, line and column of invalid bytes, malformed JSON or a row that is not an object; a
    missing, unreadable or damaged file, one that does not hold rows, or one without any.
    """
    size = 0
    is_empty = True
    for file in part_files(path):
        size += file.stat().st_size
        for row in _rows_of_file(file, encoding):
            is_empty = False
            yield row
    if is_empty:
        raise _no_rows_error(path, size)


def _rows_of_file(file: Path, encoding: str) -> Iterator[Row]:
    with open_file(file) as stream:
        if kind := table_kind(stream):
            yield from table_rows(file, kind)
            return
        text, kind = expanded(stream, file), kind_of_name(file)
        head = text.peek(64).lstrip(TEXT_BLANKS)[:1]
        chunks = ChunkReader(text, file, encoding)
        if kind in ("csv", "tsv") and head not in (b"{", b"["):
            yield from csv_rows(chunks, file, kind)
        else:
            yield from Scanner("", file, chunks.read).rows()


def parse_rows(data: bytes, file: Path, encoding: str = "utf-8") -> list[Row]:
    """All rows in the bytes of a JSON file; `file` is used in rows and error messages only.

    Raises UserError: as `stream_rows`.
    """
    rows = list(Scanner(decode(data, file, encoding), file).rows())
    if not rows:
        raise _no_rows_error(file, len(data))
    return rows


def _no_rows_error(path: Path, size: int) -> UserError:
    return UserError(f"{path} contains no rows" if size else f"{path} is empty", FORMAT_HINT)


def column_counts(rows: list[Row]) -> dict[str, int]:
    """Number of rows with each column, in the order in which the columns first appear."""
    return dict(Counter(column for row in rows for column in row.fields))


class ExampleReader:
    """Reads rows as examples, in order, without a list of them; iterate once.

    Raises UserError: at the end, for a column that no row had, or no usable row.
    """

    def __init__(self, rows: Iterable[Row], columns: Columns, source: Path | None = None) -> None:
        rest = iter(rows)
        head = list(itertools.islice(rest, SAMPLE_ROWS))
        if not head:
            raise UserError("there are no rows", "pass a file that contains rows")
        self.rows = 0  # that were read so far
        self.skipped = SkippedRows()
        self.shape = resolve(columns, head)
        self.source = source or head[0].file
        self._columns = columns
        self._rows = itertools.chain(_consumed(head), rest)
        self._converter = RowConverter(self.shape) if columns.rejected is None else PreferenceConverter(self.shape)

    @property
    def unused(self) -> Counter[str]:
        """Columns without an effect, and the number of rows with a value in them."""
        return self._converter.unused

    def __iter__(self) -> Iterator[Example | SkippedRow]:
        missing = required_columns(self._columns, self.shape)
        present: dict[str, None] = {}
        absent = set(missing.values())
        convert = self._converter.convert
        for row in self._rows:
            if absent:
                present.update(dict.fromkeys(row.fields))
                absent -= row.fields.keys()
            example = convert(row, self.rows)
            self.rows += 1
            if isinstance(example, SkippedRow):
                self.skipped.add(example)
            yield example
        _require({flag: name for flag, name in missing.items() if name in absent}, present, self.source)
        if self.skipped.total == self.rows:
            line = self.skipped.first.line if self.skipped.first else 0
            raise UserError(
                f"no usable row in {self.source.name}: {self.skipped.counts()} (first in line {line})",
                "fix the rows, or choose another shape with --format, or --prompt-column and --response-column",
            )

    def check_skipped(self, max_skipped: int | None) -> None:
        """Raise UserError if more rows were skipped than allowed; names the first one."""
        self.skipped.check(max_skipped)

    def log(self) -> None:
        """Say how the rows were read, and name what was not used."""
        logger.info("%s: read as %s: %s rows", self.source, self.shape.name, f"{self.rows:,}")
        if self.unused:
            logger.warning("%s: not used: %s", self.source, self.unused_text())
        if ignored := ignored_files(self.source):
            logger.warning("%s: not read: %s", self.source, ", ".join(file.name for file in ignored))

    def unused_text(self) -> str:
        """The unused columns with their numbers of rows."""
        return ", ".join(f"{name} in {count:,} rows" for name, count in self.unused.most_common())


def _consumed(rows: list[Row]) -> Iterator[Row]:
    """The rows, each of which is given away: they may be large."""
    rows.reverse()
    while rows:
        yield rows.pop()


def stream_examples(rows: Iterable[Row], columns: Columns, source: Path | None = None) -> ExampleReader:
    """The rows as examples and skipped rows, one by one; source: their path, else the file of the first row."""
    return ExampleReader(rows, columns, source)


def examples(
    rows: Iterable[Row], columns: Columns, max_skipped: int | None = None, source: Path | None = None
) -> tuple[list[Example], list[SkippedRow]]:
    """Split rows into usable examples and skipped rows, both in order; logs how they were read.

    Raises UserError: a column that no row has, no usable row, or more skipped rows than `max_skipped`.
    """
    reader = ExampleReader(rows, columns, source)
    used: list[Example] = []
    skipped: list[SkippedRow] = []
    for row in reader:
        used.append(row) if isinstance(row, Example) else skipped.append(row)
    reader.log()
    reader.check_skipped(max_skipped)
    return used, skipped


def check_rows(path: Path, encoding: str, columns: Columns, max_skipped: int | None) -> None:
    """Check the first CHECKED_ROWS rows of a path as training reads them, in a second and without a model.

    Raises UserError: a missing column, no usable row, more skipped rows than `max_skipped`, anything that
    `stream_rows` rejects.
    """
    require_columns(path, encoding, columns)
    reader = ExampleReader(stream_rows(path, encoding), columns, path)
    for _ in itertools.islice(reader, CHECKED_ROWS):
        pass
    reader.check_skipped(max_skipped)


def require_columns(path: Path, encoding: str, columns: Columns) -> None:
    """Check that the first rows of a file have the columns; the history column may first appear after HEAD_ROWS.

    Raises UserError: names the missing columns and those that exist.
    """
    rows = list(itertools.islice(stream_rows(path, encoding), HEAD_ROWS))
    required = required_columns(columns, resolve(columns, rows[:SAMPLE_ROWS]))
    if len(rows) == HEAD_ROWS:
        required.pop("--history-column", None)
    present = column_counts(rows)
    _require({flag: name for flag, name in required.items() if name not in present}, present, path)


def may_have_several_answers(path: Path, encoding: str, columns: Columns) -> bool:
    """Whether rows can have an answer before the last one, by the first rows of a path."""
    try:
        head = list(itertools.islice(stream_rows(path, encoding), SAMPLE_ROWS))
        shape = resolve(columns, head)
    except UserError:  # `check_rows` reports it
        return False
    histories = (row.fields.get(shape.history) for row in head) if shape.history else ()
    return bool(shape.conversations or columns.history or any(histories))


def required_columns(columns: Columns, shape: Shape) -> dict[str, str]:
    """Columns that at least one row must have, by the flag that selects another one."""
    names = {
        "--conversations-column": shape.conversations,
        "--prompt-column": shape.prompt,
        "--response-column": shape.response,
        "--rejected-column": shape.rejected,
        "--history-column": None if columns.may_lack_history else columns.history,
        "--input-column": columns.input,
        "--system-column": columns.system,
    }
    return {flag: name for flag, name in names.items() if name is not None}


def _require(missing: dict[str, str], present: Iterable[str], path: Path) -> None:
    if missing:
        names = " and ".join(f"no column {name!r}" for name in missing.values())
        raise UserError(
            f"{names} in {path.name}; columns: {', '.join(present)}",
            f"select an existing column with {' and '.join(missing)}",
        )
