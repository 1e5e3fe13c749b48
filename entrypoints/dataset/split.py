"""Write train.jsonl and dev.jsonl from an AdvertiseGen folder, a tar archive of it, or a single file of rows.

Rows keep all their fields and their order; none is checked or dropped here (that is `quality.py`). Values of a table
that JSON does not have, such as dates, become text.
"""

import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

from entrypoints.dataset.archive import is_archive, read_members
from entrypoints.dataset.json_stream import Row
from entrypoints.dataset.reader import parse_rows, read_rows
from entrypoints.errors import UserError

PARTS = ("train", "dev")  # files of AdvertiseGen: train.json and dev.json; written: train.jsonl and dev.jsonl


@dataclass(frozen=True)
class SplitOptions:
    """Size of the development set taken from a single file: either a number of rows or a share in (0, 1)."""

    rows: int | None = None
    share: float | None = None
    seed: int = 42


@dataclass(frozen=True)
class Split:
    """Rows of both sets; `shared` counts the development rows that are in the training set too."""

    train: list[Row]
    dev: list[Row]
    shared: int


def split(source: Path, encoding: str, options: SplitOptions) -> Split:
    """Read the training and development rows of a source; only a single file is divided, as `options` say.

    Raises UserError: a missing or damaged source, a missing part, a size that does not fit.
    """
    has_parts = source.is_dir() or is_archive(source)
    if not has_parts:
        train, dev = _divide(read_rows(source, encoding), options)
    elif options.rows is not None or options.share is not None:
        raise UserError(f"{source} has its own dev.json", "omit --dev-rows and --dev-share, or pass a single file")
    elif source.is_dir():
        train, dev = (read_rows(source / f"{part}.json", encoding) for part in PARTS)
    else:
        contents = read_members(source, [f"{part}.json" for part in PARTS])
        train, dev = (parse_rows(data, path, encoding) for path, data in contents)
    known = {_row_key(row) for row in train}
    return Split(train, dev, shared=sum(_row_key(row) in known for row in dev))


def write_split(result: Split, folder: Path, overwrite: bool) -> list[Path]:
    """Write train.jsonl and dev.jsonl as UTF-8 JSON lines, first to a temporary folder; returns their paths.

    Raises UserError: a file exists and must not be replaced, is the source of these rows, or cannot be written.
    """
    targets = [folder / f"{part}.jsonl" for part in PARTS]
    sources = {row.file.resolve() for row in (result.train[0], result.dev[0])}
    for target in targets:
        if target.exists() and not overwrite:
            raise UserError(f"{target} exists", "choose another folder or pass --overwrite")
        if target.resolve() in sources:
            raise UserError(f"{target} is the source of these rows", "choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".split-") as temporary:
            for target, rows in zip(targets, (result.train, result.dev), strict=True):
                with (Path(temporary) / target.name).open("wb") as out:
                    out.writelines(_json_line(row) for row in rows)
            for target in targets:
                (Path(temporary) / target.name).replace(target)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}", "choose a writable folder") from error
    return targets


def _divide(rows: list[Row], options: SplitOptions) -> tuple[list[Row], list[Row]]:
    """Groups of equal rows, in random order, fill the development set; no group is divided."""
    size = _dev_size(len(rows), options)
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(_row_key(row), []).append(index)
    shuffled = list(groups.values())
    random.Random(options.seed).shuffle(shuffled)
    dev: set[int] = set()
    for group in shuffled:
        if len(dev) + len(group) <= size:
            dev.update(group)
    if not dev:
        raise UserError(f"every group of equal rows in {rows[0].file} has more than {size} rows", "increase --dev-rows")
    return [row for i, row in enumerate(rows) if i not in dev], [rows[i] for i in sorted(dev)]


def _dev_size(total: int, options: SplitOptions) -> int:
    if options.rows is not None and options.share is None:
        size = options.rows
    elif options.share is not None and options.rows is None:
        if not 0 < options.share < 1:
            raise UserError(
                f"--dev-share {options.share} is out of range", "use a number between 0 and 1, such as 0.05"
            )
        size = max(1, round(options.share * total))
    else:
        raise UserError("the size of the development set is not given", "pass --dev-rows or --dev-share, one of them")
    if not 0 < size < total:
        raise UserError(f"a development set of {size} out of {total} rows", "leave at least one row for each set")
    return size


def _row_key(row: Row) -> str:
    return json.dumps(row.fields, sort_keys=True, default=str)


def _json_line(row: Row) -> bytes:
    try:
        return (json.dumps(row.fields, ensure_ascii=False, default=str) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate ("\ud83d"): only an escape can represent it
        return (json.dumps(row.fields, default=str) + "\n").encode("ascii")
