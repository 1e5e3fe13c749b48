"""Rows of CSV, TSV, Parquet and Arrow files; the first line or the schema names the columns."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entrypoints.dataset import json_stream
from entrypoints.dataset.json_stream import ChunkReader, Row
from entrypoints.dataset.row_files import import_pyarrow
from entrypoints.errors import UserError

BATCH_ROWS = 1024  # of a table in memory at once
DELIMITERS = {"csv": ",;\t", "tsv": "\t"}  # the most frequent one in the first line separates the fields


def csv_rows(chunks: ChunkReader, file: Path, kind: str) -> Iterator[Row]:
    """The rows of a CSV or TSV file; every cell is text, `line` is the line in which the row starts.

    Columns at the end with neither a name nor a value, as a spreadsheet saves them, are ignored.
    Raises UserError: names the line with another number of fields than the first one, with a value in a column without
    a name, or with a quote that is open.
    """
    csv.field_size_limit(json_stream.MAX_ROW_CHARS)
    lines = _lines(chunks)
    header = next(lines, "")
    delimiter = max(DELIMITERS[kind], key=header.count)
    names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    width = len(names)
    while names and not names[-1]:
        names.pop()
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{file}:1: the column {repeated[0]!r} is there twice", "rename one of them")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    line = 2
    try:
        for cells in reader:
            if cells:
                _check_cells(cells, len(names), width, delimiter, f"{file}:{line}")
                yield Row(file, line, dict(zip(names, cells, strict=False)))
            line = reader.line_num + 2
    except csv.Error as error:
        raise UserError(f"{file}:{line}: not CSV: {error}", "double each quote inside a quoted field") from error


def _check_cells(cells: list[str], named: int, width: int, delimiter: str, place: str) -> None:
    """named, width: columns of the first line with a name, and all; Excel omits the last ones of some rows."""
    quoting = f"put text that contains {delimiter!r} in double quotes"
    if not named <= len(cells) <= width:
        raise UserError(f"{place}: {len(cells)} fields, the first line names {width} columns", quoting)
    for number, cell in enumerate(cells[named:], start=named + 1):
        if cell.strip():
            problem = f"{place}: a value in column {number}, which has no name in the first line"
            raise UserError(problem, f"name the column, or {quoting}")


def _lines(chunks: ChunkReader) -> Iterator[str]:
    rest, end = "", ""
    while text := chunks.read(len(rest)):  # as much again as waits: a long line is joined only log(length) times
        rest += text
        end = end or _line_end(rest)
        *whole, rest = rest.split(end) if end else [rest]
        if len(rest) > json_stream.MAX_ROW_CHARS:
            problem = (
                f"{chunks.file}:{chunks.line}: a line of more than {json_stream.MAX_ROW_CHARS >> 20} million characters"
            )
            raise UserError(problem, "save the file with one row per line")
        yield from (f"{line}\n" for line in whole)
    if rest:
        yield rest


def _line_end(text: str) -> str:
    """The end of the first line, a lone carriage return if Excel for Mac saved the file; "" while it is not there."""
    first = re.search(r"\r(?!\n|\Z)|\n", text)
    return first[0] if first else ""


def table_rows(file: Path, kind: str) -> Iterator[Row]:
    """The rows of a Parquet file, or of an Arrow file or stream as Hugging Face datasets writes it; lines count rows.

    Raises UserError: pyarrow is not installed, or the file is damaged.
    """
    arrow = import_pyarrow(file)
    number = 0
    try:
        for batch in _batches(file, kind):
            for fields in batch.to_pylist():
                number += 1
                yield Row(file, number, fields)
    except (arrow.ArrowException, OSError) as error:
        text = str(error).splitlines()[0]
        raise UserError(f"{file} is not a complete {kind.split()[0].title()} file: {text}", "copy it again") from error


def _batches(file: Path, kind: str) -> Iterator[Any]:
    if kind == "parquet":
        with import_pyarrow(file, "pyarrow.parquet").ParquetFile(file) as table:
            yield from table.iter_batches(BATCH_ROWS)
        return
    ipc = import_pyarrow(file, "pyarrow.ipc")
    with import_pyarrow(file).memory_map(str(file)) as source:
        if kind == "arrow stream":
            yield from ipc.open_stream(source)
            return
        reader = ipc.open_file(source)
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)
