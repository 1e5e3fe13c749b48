"""Members of a tar archive, plain or compressed, read in memory with limits; nothing is extracted.

A small file can claim terabytes: as a sparse member, in a compressed stream, or in the header of a member.
"""

import bz2
import contextlib
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from entrypoints.dataset.reader import TEXT_BLANKS
from entrypoints.dataset.row_files import kind_of_name
from entrypoints.errors import UserError
from entrypoints.untrusted import confined_path

MAX_EXPANDED_BYTES = 1 << 30  # of the whole archive, and of the members that are read; AdvertiseGen has 55 MB
MAX_MEMBERS = 10_000
CHUNK_BYTES = 1 << 20
MAX_HEADER_BYTES = 4 << 20  # of one read: tarfile reads long names and extended headers at once
OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open, b"]\0\0": lzma.open}
DAMAGED = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError, ValueError, OverflowError)


class _BoundedStream:
    """Read access to an expanded archive up to MAX_EXPANDED_BYTES. Raises UserError beyond."""

    def __init__(self, stream: IO[bytes], source: Path) -> None:
        self._stream, self._source = stream, source

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise UserError(f"{self._source} has a member whose header claims {size} bytes", "download it again")
        self._check(self._stream.tell() + size)
        return self._stream.read(size)

    def seek(self, position: int) -> int:
        self._check(position)
        return self._stream.seek(position)

    def tell(self) -> int:
        return self._stream.tell()

    def _check(self, position: int) -> None:
        if position > MAX_EXPANDED_BYTES + MAX_HEADER_BYTES:  # tarfile may read beyond the end
            raise _size_error(self._source)


def is_archive(source: Path) -> bool:
    """By content. What starts like gzip counts, so that a damaged download is reported, unless JSON rows are in it."""
    try:
        if source.is_dir() or kind_of_name(source):
            return False
        with source.open("rb") as file:
            if file.read(2) == b"\x1f\x8b":
                return not _starts_with_json(source)
        with _open(source):
            return True
    except DAMAGED:  # missing or unreadable: reported when the rows are read
        return False


def _starts_with_json(file: Path) -> bool:
    """Whether gzip text starts like rows; what cannot be decompressed does not."""
    try:
        with gzip.open(file) as stream:
            return stream.read(64).lstrip(TEXT_BLANKS)[:1] in (b"{", b"[")
    except DAMAGED:
        return False


def read_members(source: Path, names: Sequence[str]) -> list[tuple[Path, bytes]]:
    """Path (below `source`, for messages) and contents of the one member with each file name.

    Raises UserError: no such member or several, a damaged archive, or one that expands beyond MAX_EXPANDED_BYTES.
    """
    found: dict[str, list[tuple[Path, bytes]]] = {name: [] for name in names}
    remaining = MAX_EXPANDED_BYTES
    try:
        with _open(source) as archive:
            for count, member in enumerate(archive):
                if count >= MAX_MEMBERS:
                    raise UserError(f"{source} has more than {MAX_MEMBERS} members", "pack train.json and dev.json")
                name = PurePosixPath(member.name).name
                if member.isfile() and name in found:
                    path = confined_path(source, member.name, source)
                    data = _read(archive, member, source, remaining)
                    remaining -= len(data)
                    found[name].append((path, data))
    except DAMAGED as error:
        raise UserError(f"{source} is not a complete tar archive: {error}", "download it again") from error
    for name, entries in found.items():
        if len(entries) != 1:
            raise UserError(
                f"{source} contains {len(entries)} files named {name}",
                "it must contain one train.json and one dev.json",
            )
    return [entries[0] for entries in found.values()]


@contextlib.contextmanager
def _open(source: Path) -> Iterator[tarfile.TarFile]:
    with source.open("rb") as file:
        start = file.read(8)
    opener = next((opener for magic, opener in OPENERS.items() if start.startswith(magic)), open)
    with opener(source, "rb") as stream:
        bounded = cast("IO[bytes]", _BoundedStream(stream, source))  # all that tarfile uses of a file
        with tarfile.open(fileobj=bounded, mode="r:") as archive:
            yield archive


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo, source: Path, max_bytes: int) -> bytes:
    """Contents of a member. `size` of a sparse one counts its holes, which take no space in the archive."""
    if member.size > max_bytes:
        raise _size_error(source)
    content = archive.extractfile(member)
    data = bytearray()
    while content and (chunk := content.read(CHUNK_BYTES)):
        data += chunk
        if len(data) > max_bytes:
            raise _size_error(source)
    return bytes(data)


def _size_error(source: Path) -> UserError:
    return UserError(
        f"{source} expands to more than {MAX_EXPANDED_BYTES >> 20} MB",
        "unpack it yourself if you trust it, and pass the folder with train.json and dev.json",
    )
