"""Make train.jsonl and dev.jsonl from an AdvertiseGen folder, a tar archive of it, or one file of rows.

Rows keep all their fields and their order; nothing is judged or dropped here (that is `checking`).
"""

import json
import random
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from entrypoints.dataset.reading import Row, parse_rows, read_rows
from entrypoints.errors import UserError

PARTS = ("train", "dev")  # of AdvertiseGen: train.json and dev.json; we write train.jsonl and dev.jsonl


@dataclass(frozen=True)
class DevSet:
    """How much of a single file becomes the development set: a number of rows or a share in (0, 1); never both."""

    rows: int | None = None
    share: float | None = None
    seed: int = 42


@dataclass(frozen=True)
class Split:
    """Rows of the two sides; `shared` counts development rows that the training side holds too."""

    train: list[Row]
    dev: list[Row]
    shared: int


def split(source: Path, encoding: str, wanted: DevSet) -> Split:
    """Read a source and tell its two sides apart; only a single file is cut, by `wanted`.

    Raises UserError: a missing or broken source, a part that is not there, a size that does not fit.
    """
    parted = source.is_dir() or _is_archive(source)
    if not parted:
        train, dev = _cut(read_rows(source, encoding), wanted)
    elif wanted.rows is not None or wanted.share is not None:
        raise UserError(f"{source} has its own dev.json", "leave --dev-rows and --dev-share out, or name a single file")
    elif source.is_dir():
        train, dev = (read_rows(source / f"{part}.json", encoding) for part in PARTS)
    else:
        train, dev = _from_tar(source, encoding)
    known = {_identity(row) for row in train}
    return Split(train, dev, shared=sum(_identity(row) in known for row in dev))


def write_split(done: Split, folder: Path, overwrite: bool) -> list[Path]:
    """Write train.jsonl and dev.jsonl as UTF-8 JSON lines, drafted first: none is left half written; returns the paths.

    Raises UserError: a file is there already and may not be replaced, is a source of these rows, or cannot be written.
    """
    targets = [folder / f"{part}.jsonl" for part in PARTS]
    sources = {row.file.resolve() for row in (done.train[0], done.dev[0])}
    for target in targets:
        if target.exists() and not overwrite:
            raise UserError(f"{target} exists", "choose another folder or pass --overwrite")
        if target.resolve() in sources:
            raise UserError(f"{target} is the source of these rows", "choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".split-") as draft:
            for target, rows in zip(targets, (done.train, done.dev), strict=True):
                with (Path(draft) / target.name).open("wb") as out:
                    out.writelines(_line(row) for row in rows)
            for target in targets:
                (Path(draft) / target.name).replace(target)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}", "choose a writable folder") from error
    return targets


def _cut(rows: list[Row], wanted: DevSet) -> tuple[list[Row], list[Row]]:
    """Whole groups of equal rows go to one side, drawn at random, until the development set is full."""
    size = _dev_size(len(rows), wanted)
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(_identity(row), []).append(index)
    drawn = list(groups.values())
    random.Random(wanted.seed).shuffle(drawn)
    dev: set[int] = set()
    for group in drawn:
        if len(dev) + len(group) <= size:
            dev.update(group)
    if not dev:
        raise UserError(
            f"no group of equal rows in {rows[0].file} is as small as {size} rows", "ask for a larger --dev-rows"
        )
    return [row for i, row in enumerate(rows) if i not in dev], [rows[i] for i in sorted(dev)]


def _dev_size(total: int, wanted: DevSet) -> int:
    if (wanted.rows is None) == (wanted.share is None):
        raise UserError("the size of the development set is open", "pass --dev-rows or --dev-share, one of them")
    if wanted.share is not None and not 0 < wanted.share < 1:
        raise UserError(f"--dev-share {wanted.share} is no share", "give a number between 0 and 1, such as 0.05")
    size = wanted.rows if wanted.share is None else max(1, round(wanted.share * total))
    if not 0 < size < total:
        raise UserError(f"a development set of {size} out of {total} rows", "leave at least one row on each side")
    return size


def _is_archive(source: Path) -> bool:
    """Told by content; whatever begins like gzip counts, so that a damaged download is named as one."""
    try:
        with source.open("rb") as file:
            return file.read(2) == b"\x1f\x8b" or tarfile.is_tarfile(source)
    except OSError:  # not there or not readable: reading it as rows says so
        return False


def _from_tar(source: Path, encoding: str) -> list[list[Row]]:
    """Read the two members in memory: nothing is extracted, so no path in the archive can do harm."""
    try:
        with tarfile.open(source) as archive:
            members = [member for member in archive if member.isfile()]
            parts = [_member(source, members, f"{part}.json") for part in PARTS]
            texts = [archive.extractfile(part).read() for part in parts]
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"{source} is no whole tar archive: {error}", "download it again") from error
    return [parse_rows(text, source / part.name, encoding) for text, part in zip(texts, parts, strict=True)]


def _member(source: Path, members: list[tarfile.TarInfo], name: str) -> tarfile.TarInfo:
    found = [member for member in members if PurePosixPath(member.name).name == name]
    if len(found) != 1:
        raise UserError(
            f"{source} holds {len(found)} files named {name}", "it must hold one train.json and one dev.json"
        )
    return found[0]


def _identity(row: Row) -> str:
    return json.dumps(row.fields, sort_keys=True)


def _line(row: Row) -> bytes:
    try:
        return (json.dumps(row.fields, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # half a character ("\ud83d" alone): only an escape can hold it
        return (json.dumps(row.fields) + "\n").encode("ascii")
