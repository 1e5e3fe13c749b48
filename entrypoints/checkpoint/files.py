"""Files of a checkpoint folder: LFS pointers, safetensors headers, and writing beside the target."""

import contextlib
import fcntl
import json
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
        except ValueError as error:
            raise UserError(f"{file} is no safetensors file ({error})", again) from error
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
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
    target = target.absolute()
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists", "choose another folder, or add --overwrite")
    if target.is_file():
        raise UserError(f"{target} is a file", "name a folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = (target.parent / f".{target.name}.lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write in {target.parent} ({error.strerror})", "choose another folder") from error
    partial = target.parent / f".{target.name}.partial"
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {target}", "wait for it to end") from None
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            _replace(target, partial)
        except OSError as error:
            raise UserError(
                f"writing {target} failed: {error.strerror or error}", "free space or check the disk"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            Path(lock.name).unlink(missing_ok=True)


def _replace(target: Path, partial: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    partial.rename(target)
    shutil.rmtree(old)
