"""Files of a checkpoint folder: LFS pointers, safetensors headers, and writing beside the target."""

import contextlib
import fcntl
import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

from entrypoints.errors import UserError

LFS_MARK = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(file: Path) -> None:
    """Raise UserError if the file is the small text that git-lfs leaves in place of the real one."""
    with file.open("rb") as stream:
        if stream.read(len(LFS_MARK)) == LFS_MARK:
            raise UserError(
                f"{file} is a Git LFS pointer, not the file itself",
                "run `git lfs pull` in that folder, or use glm download",
            )


def safetensors_header(file: Path) -> dict[str, dict]:
    """Tensor name -> {dtype, shape, data_offsets} without reading the data.

    Raises UserError when the file is an LFS pointer, damaged, or shorter or longer than its header says.
    """
    refuse_lfs_pointer(file)
    again = "copy or download the file again"
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length + 8 > size:
            raise UserError(f"{file} is truncated: its header does not fit in {size} bytes", again)
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            ends = [(entry["dtype"], entry["shape"], entry["data_offsets"][1])[2] for entry in header.values()]
        except (ValueError, AttributeError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"{file} is no safetensors file ({error!r})", again) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise UserError(f"{file} has {size} bytes, its header says {expected}", again)
    return header


def require_space(folder: Path, needed: int) -> None:
    """Raise UserError unless the disk of `folder` (or of its nearest existing parent) has `needed` bytes free."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{folder} needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free",
            "free space or choose another disk",
        )


@contextlib.contextmanager
def written_beside(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a hidden folder beside `target` to write in, and rename it to `target` when the block ends without an error.

    On an error or an interrupt the hidden folder is removed and `target` is as it was; leftovers of a killed run go
    at the next one. Raises UserError when `target` exists (without `overwrite`) or another process writes it.
    """
    target = target.resolve()  # a link stays, what it points to is replaced
    with _locked(target):
        if target.is_file():
            raise UserError(f"{target} is a file", "name a folder")
        if target.exists() and not overwrite:
            raise UserError(f"{target} exists", "choose another folder, or add --overwrite")
        partial = target.parent / f".{target.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
            _replace(target, partial)
        except OSError as error:
            raise UserError(
                f"writing {target} failed: {error.strerror or error}", "free space or check the disk"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def file_written_beside(target: Path) -> Iterator[Path]:
    """As `written_beside`, for one file: give the path to write; `target` must not exist."""
    target = target.resolve()
    with _locked(target):
        if target.exists():
            raise UserError(f"{target} exists", "choose another name, or remove it")
        partial = target.parent / f".{target.name}.partial"
        try:
            yield partial
            partial.rename(target)
        except OSError as error:
            raise UserError(
                f"writing {target} failed: {error.strerror or error}", "free space or check the disk"
            ) from error
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock on a file, made if it is not there, and wait for whoever holds it; for work that one does for all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks: at worst two do the same work
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    busy = UserError(f"another process is writing {target}", "wait for it to end")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = (target.parent / f".{target.name}.lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write in {target.parent} ({error.strerror})", "choose another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken_away = not os.path.samestat(os.fstat(lock.fileno()), Path(lock.name).stat())
        except (BlockingIOError, FileNotFoundError):
            raise busy from None
        if taken_away:  # the process that held it ended meanwhile, and the next one made its own
            raise busy
        try:
            yield
        finally:
            Path(lock.name).unlink(missing_ok=True)


def _replace(target: Path, partial: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
