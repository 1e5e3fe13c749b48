"""Atomic writes, file locks and integrity checks that read no weights (Git LFS pointers, safetensors headers)."""

import contextlib
import errno
import json
import logging
import math
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from entrypoints.errors import UserError, read_remedy
from entrypoints.sizes import format_size

logger = logging.getLogger(__name__)
LFS_POINTER_PREFIX = b"version https://git-lfs.github.com/spec/"
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, as in the safetensors library
MAX_DIMENSION = 1 << 48
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
LOCKS_UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # flock on some network and FUSE file systems


def check_not_lfs_pointer(file: Path) -> None:
    """Raises UserError if the file is the short text that Git LFS leaves in place of the real file."""
    with file.open("rb") as stream:
        if stream.read(len(LFS_POINTER_PREFIX)) == LFS_POINTER_PREFIX:
            raise UserError(
                f"{file} is a Git LFS pointer, not the file itself",
                "run `git lfs pull` in that folder, or use glm download",
            )


def read_safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {dtype, shape, data_offsets}, without reading the data.

    Raises UserError: the file is an LFS pointer, damaged, or its size differs from what its header specifies.
    """
    check_not_lfs_pointer(file)
    remedy = "copy or download the file again"
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length + 8 > size:
            raise UserError(f"{file} is truncated: its header does not fit in {size} bytes", remedy)
        if length > MAX_HEADER_BYTES:
            raise UserError(f"{file} is damaged: its header has {length} bytes", remedy)
        text = stream.read(length)
    try:
        header: dict[str, dict[str, Any]] = json.loads(text)
        header.pop("__metadata__", None)
        data_bytes = _check_entries(header)
    except (ValueError, AttributeError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is not a safetensors file ({error!r})", remedy) from error
    expected = 8 + length + data_bytes
    if size != expected:
        raise UserError(f"{file} has {size} bytes, its header specifies {expected}", remedy)
    return header


def _check_entries(header: dict[str, dict[str, Any]]) -> int:
    """Size of the data in bytes. Raises ValueError, KeyError or TypeError: entries are invalid, overlap or leave gaps.

    The library checks the same when it opens a file; many headers are read here only.
    """
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0])):
        shape, (start, stop) = entry["shape"], entry["data_offsets"]
        numbers = (*shape, start, stop)
        # dimensions beside a 0 count too: torch multiplies them for the strides of an empty tensor
        if not all(type(number) is int and 0 <= number <= MAX_DIMENSION for number in numbers) or (
            math.prod(max(1, number) for number in shape) > MAX_DIMENSION
        ):
            raise ValueError(f"{name[:80]}: invalid shape or offsets")
        if start != end or stop - start != math.prod(shape) * DTYPE_BYTES[entry["dtype"]]:
            raise ValueError(f"{name[:80]}: its offsets overlap, leave a gap or do not match its shape")
        end = stop
    return end


def require_disk_space(folder: Path, needed: int) -> None:
    """Raises UserError unless the disk of `folder` (or of its nearest existing parent) has `needed` bytes free."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{folder} needs {format_size(needed)}, its disk has {format_size(free)} free",
            "free space or choose another disk",
        )


def check_new_folder(target: Path, overwrite: bool = False) -> None:
    """Raises UserError: the target of `atomic_folder` is a file, or exists without `overwrite`."""
    if target.is_file():
        raise UserError(f"{target} is a file", "give the path of a folder")
    if target.exists() and not overwrite:
        raise UserError(f"{target} already exists", "choose another folder, or add --overwrite")


@contextlib.contextmanager
def atomic_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden folder beside `target` to write to, and rename it to `target` when the block succeeds.

    On an error or interrupt the hidden folder is removed and `target` stays unchanged. What a killed process left
    behind is removed by the next run. Raises UserError: `target` exists (without `overwrite`), another process is
    writing it, or the disk is full.
    """
    target = target.resolve()  # a symbolic link is kept, the folder it points to is replaced
    with _write_lock(target):
        check_new_folder(target, overwrite)
        partial = target.parent / f".{target.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
            replace_folder(target, partial)
        except OSError as error:
            raise _write_error(target, partial, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def replace_folder(target: Path, partial: Path) -> None:
    """Rename the folder `partial` to `target`; an older `target` is removed last."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Like `atomic_folder`, for one file: yield the path to write to. Raises UserError also when `target` exists."""
    target = target.resolve()
    with _write_lock(target):
        if target.exists():
            raise UserError(f"{target} already exists", "choose another name, or move it elsewhere")
        partial = target.parent / f".{target.name}.partial"
        try:
            yield partial
            partial.rename(target)
        except OSError as error:
            raise _write_error(target, partial, error) from error
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive_lock(file: Path, waiting_for: str = "") -> Iterator[None]:
    """Hold a lock on a file, which is created if needed; waits for the process that holds it.

    waiting_for: what the other process does, for the log line of a process that has to wait. A file system without
    locks does not stop the work: at worst two processes do it twice. Raises OSError: the file cannot be created.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = _file_lock(file)
    try:
        _acquire(lock, blocking=False)
    except Timeout:
        logger.info("another process %s; waiting for it", waiting_for or f"holds {file}")
        _acquire(lock, blocking=True)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _write_lock(target: Path) -> Iterator[None]:
    """Fail at once if another process writes the same target; the lock file is removed at the end."""
    file = target.parent / f".{target.name}.lock"
    lock = _file_lock(file)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, blocking=False)
    except Timeout:
        raise UserError(f"another process is writing {target}", "wait until it has finished") from None
    except OSError as error:
        raise UserError(f"cannot write in {target.parent} ({error.strerror})", "choose another folder") from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held: filelock rejects a lock file that has no name anymore
        lock.release()


def _file_lock(file: Path) -> FileLock:
    # no soft lock where flock is missing: its marker file would outlive a killed process
    return FileLock(file, fallback_to_soft=False)


def _acquire(lock: FileLock, blocking: bool) -> None:
    try:
        lock.acquire(blocking=blocking)
    except OSError as error:
        if isinstance(error, Timeout) or error.errno not in LOCKS_UNSUPPORTED:
            raise
        logger.warning("the file system of %s has no locks; do not run two processes on it at once", lock.lock_file)


def access_error(error: OSError) -> UserError:
    """What to report for an error that names a file: which file or folder this process may not use, and what helps."""
    file, group = str(error.filename2 or error.filename), os.getgid()
    reason, user = f"({error.strerror})", f"user {os.getuid()}, group {group}"
    if not isinstance(error, PermissionError):
        remedy = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the path"
        return UserError(f"cannot use {file} {reason}", f"{remedy}; --debug shows where")
    if folder := _closed_folder(Path(os.path.realpath(file))):
        remedy = f"make {folder} accessible for {user}: chgrp {group} {folder} && chmod g+rx {folder}"
        return UserError(f"cannot read {file} {reason}", remedy)
    if not os.path.lexists(file) or os.access(file, os.R_OK, effective_ids=True):
        is_writable = os.path.lexists(file) and os.access(file, os.W_OK, effective_ids=True)
        closed = file if os.path.lexists(file) and not is_writable else str(Path(file).parent)
        return UserError(f"cannot write {file} {reason}", f"make {closed} writable for {user}, or choose another path")
    return UserError(f"cannot read {file} {reason}", read_remedy(error, file, ""))


def _closed_folder(path: Path) -> Path | None:
    """The folder that keeps this process from `path`, or `path` if it is a folder that cannot be read."""
    for folder in reversed(path.parents):
        if not os.access(folder, os.X_OK, effective_ids=True):
            return folder
    return path if path.is_dir() and not os.access(path, os.R_OK | os.X_OK, effective_ids=True) else None


def _write_error(target: Path, partial: Path, error: OSError) -> UserError:
    # an error of a rename names two files
    is_path = isinstance(error.filename, str) and not error.filename2
    if isinstance(error, PermissionError) and is_path and not Path(error.filename).is_relative_to(partial):
        return access_error(error)
    return UserError(f"writing {target} failed: {error.strerror or error}", "free space or check the disk")
