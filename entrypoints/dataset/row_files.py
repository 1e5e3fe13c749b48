"""Which files hold the rows of a path, and what is in them: text, compressed text, a table, or no rows at all.

A path is a file, a folder of parts, or a glob of them. The first bytes decide what a file is, not its name.
"""

import bz2
import glob
import gzip
import io
import lzma
import re
import shlex
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from entrypoints.errors import UserError

COMPRESSIONS: dict[bytes, str] = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
TABLES: dict[bytes, str] = {b"PAR1": "parquet", b"ARROW1": "arrow file", b"\xff\xff\xff\xff": "arrow stream"}
PACKED: dict[bytes, str] = {b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"Rar!": "a RAR archive"}
OLD_EXCEL = b"\xd0\xcf\x11\xe0"
ZIP = b"PK\x03\x04"
SHEETS = {"xl/workbook.xml": "an Excel workbook", "content.xml": "an OpenDocument file"}  # members of a zip archive
TAR_MAGIC, TAR_OFFSET, HEAD_BYTES = b"ustar", 257, 512
KINDS = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv"} | {
    ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")  # of Hugging Face datasets
SPLITS = {
    "train": "train",
    "test": "test",
    "dev": "dev",
    "valid": "dev",
    "validation": "dev",
    "val": "dev",
    "eval": "dev",
}
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, OSError)


def part_files(path: Path) -> list[Path]:
    """The files of a path in natural order, part-2 before part-10; a plain file is its only part.

    Raises UserError: nothing there, or a folder that holds several splits or kinds of files, of which one is meant.
    """
    try:
        if path.is_dir():
            return _parts_of_folder(path)
        if path.exists() or not glob.has_magic(str(path)):
            path.stat()
            return [path]
        names = glob.glob(str(path))  # noqa: PTH207  # a pattern may be absolute
        found = sorted((Path(name) for name in names if Path(name).is_file()), key=_natural_order)
    except FileNotFoundError:
        raise UserError(f"file not found: {path}", "check the path") from None
    except OSError as error:  # also a folder without permission, at any of these calls
        raise UserError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from error
    if not found:
        raise UserError(f"no file matches {path}", "check the pattern, and quote it in the shell")
    return found


def ignored_files(path: Path) -> list[Path]:
    """Visible files of a folder that hold no rows by their name."""
    if not path.is_dir():
        return []
    return sorted(
        file for file in path.iterdir() if not file.name.startswith(".") and file.is_file() and not _kind(file)
    )


def kind_of_name(file: Path) -> str:
    """`json`, `jsonl`, `csv`, `tsv`, `parquet` or `arrow` by the suffix, also below .gz and the like; else empty."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return KINDS.get(suffixes[-1], "") if suffixes else ""


def table_kind(stream: io.BufferedReader) -> str:
    """`parquet`, `arrow file` or `arrow stream` by the first bytes; empty for another file."""
    return next((kind for magic, kind in TABLES.items() if stream.peek(HEAD_BYTES).startswith(magic)), "")


def open_file(file: Path) -> io.BufferedReader:
    """The bytes of a file. Raises UserError when it cannot be opened."""
    try:
        return file.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}", "check its permissions") from error


def expanded(stream: io.BufferedReader, file: Path) -> io.BufferedReader:
    """The text in the bytes of a file, decompressed while it is read.

    Raises UserError: a spreadsheet or an archive, with the command that helps.
    """
    head = stream.peek(HEAD_BYTES)
    _refuse_packed(file, head)
    compression = next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), None)
    if compression is None:
        return stream
    text = io.BufferedReader(cast("Any", _Expanded(stream, file, compression)))
    _refuse_packed(file, text.peek(HEAD_BYTES))
    return text


class _Expanded(io.RawIOBase):
    """Reads a compressed stream; damage is a UserError that names the file."""

    def __init__(self, stream: BinaryIO, file: Path, compression: str) -> None:
        self._file, self._compression, self._compressed = file, compression, stream
        self._stream = _decompressor(stream, file, compression)

    def readable(self) -> bool:
        """Always, as `io.RawIOBase` requires."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with decompressed bytes; returns their number, 0 at the end."""
        try:
            data = self._stream.read(len(buffer))
        except DAMAGED as error:
            raise UserError(
                f"{self._file} is not a complete {self._compression} file: {error}", "copy it again"
            ) from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            self._compressed.close()
        super().close()


def import_pyarrow(file: Path, module: str = "pyarrow") -> Any:
    """A module of pyarrow, which only tables and zstd need. Raises UserError where it is not installed."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"reading {file} needs the package pyarrow", "pip install 'glm-entrypoints[train]'") from None


def _decompressor(stream: BinaryIO, file: Path, compression: str) -> IO[bytes]:
    openers: dict[str, Callable[[BinaryIO], Any]] = {
        "gzip": lambda raw: gzip.GzipFile(fileobj=raw),
        "bzip2": bz2.BZ2File,
        "xz": lzma.LZMAFile,
        "zstd": lambda raw: import_pyarrow(file).CompressedInputStream(raw, "zstd"),
    }
    return cast("IO[bytes]", openers[compression](stream))


def _refuse_packed(file: Path, head: bytes) -> None:
    folder = file.with_name(file.name.split(".")[0] or "rows")
    if head.startswith(ZIP):
        kind = _sheet_in_zip(file)
        if kind:
            raise _spreadsheet_error(file, kind)
        command = f"python -m zipfile -e {shlex.quote(str(file))} {shlex.quote(str(folder))}"
        raise UserError(f"{file} is a zip archive", f"unpack it and pass the folder: {command}")
    if head.startswith(OLD_EXCEL):
        raise _spreadsheet_error(file, "an Excel workbook")
    if head[TAR_OFFSET:].startswith(TAR_MAGIC):
        target = shlex.quote(str(folder))
        command = f"mkdir -p {target} && tar -xf {shlex.quote(str(file))} -C {target}"
        raise UserError(f"{file} is a tar archive", f"unpack it and pass the folder: {command}")
    if kind := next((kind for magic, kind in PACKED.items() if head.startswith(magic)), None):
        raise UserError(f"{file} is {kind}", "unpack it and pass the folder")


def _sheet_in_zip(file: Path) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            names = set(archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None
    return next((kind for member, kind in SHEETS.items() if member in names), None)


def _spreadsheet_error(file: Path, kind: str) -> UserError:
    code = f"import pandas; pandas.read_excel({str(file)!r}).to_csv({str(file.with_suffix('.csv'))!r}, index=False)"
    return UserError(
        f"{file} is {kind}",
        f"save it as CSV in UTF-8, or run (with pandas and openpyxl): python -c {shlex.quote(code)}",
    )


def _parts_of_folder(folder: Path) -> list[Path]:
    files = [file for file in folder.iterdir() if not file.name.startswith(".") and file.is_file() and _kind(file)]
    if not files:
        raise UserError(
            f"{folder} contains no file of rows", f"pass a file, or a folder with files in {', '.join(KINDS)}"
        )
    splits = {split: file.name for file in files if (split := _split_of(file))}
    kinds = {_kind(file): file.name for file in files}
    for what, found in (("splits", splits), ("kinds of files", kinds)):
        if len(found) > 1:
            names = ", ".join(sorted(found.values()))
            raise UserError(
                f"{folder} holds several {what}: {names}", f"pass one of them, or a glob such as '{folder}/NAME*'"
            )
    return sorted(files, key=_natural_order)


def _kind(file: Path) -> str:
    return "" if file.name in NOT_ROWS else kind_of_name(file)


def _split_of(file: Path) -> str | None:
    words = re.split(r"[^a-z]+", file.name.split(".")[0].lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _natural_order(file: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", str(file))]
