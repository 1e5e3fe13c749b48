"""Download one file to a folder: resumed, retried a bounded number of times, verified, then renamed into place.

`huggingface_hub` is not used for this: version 2.4 deletes a partial file when a download fails or the process ends
(`_download_to_tmp_and_move`), so a connection lost near the end of a 2 GB shard would start from scratch.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
from huggingface_hub import get_session

from entrypoints.checkpoint.atomic_files import LFS_POINTER_PREFIX
from entrypoints.checkpoint.manifest import sha256
from entrypoints.errors import UserError
from entrypoints.hub.listing import SET_TOKEN, TIMEOUT, TRANSIENT_STATUSES
from entrypoints.hub.record import HubFile
from entrypoints.settings import Secret
from entrypoints.untrusted import confined_path

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 6  # in a row that bring less than PROGRESS_BYTES each
PROGRESS_BYTES = 8 << 20
RETRY_WAIT_SECONDS = 1.0  # before the second attempt; doubles
MAX_RETRY_WAIT_SECONDS = 30.0
MAX_LFS_POINTER_BYTES = 1024
RUN_AGAIN = "run the same command again: it resumes"

Progress = Callable[[int], object]  # called with the number of bytes received since the last call


class _TransientError(Exception):
    """An error that a retry may fix."""

    def __init__(self, reason: str, wait_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds


def fetch(file: HubFile, url: str, folder: Path, token: Secret, progress: Progress) -> str:
    """Download `file` to `folder`; returns its SHA-256.

    progress: called with the number of bytes as they arrive, negative after a restart. The token is sent to the host of
    `url` only, never to a host that it redirects to. Raises UserError.
    """
    target = confined_path(folder, file.path, "the hub's list of files")
    part = confined_path(folder, f"{file.path}.part", folder)
    if size_on_disk(part) > file.size:
        part.unlink(missing_ok=True)
    progress(size_on_disk(part))
    failures = 0
    while (offset := size_on_disk(part)) < file.size:
        try:
            _attempt(file, url, part, token, progress)
        except (httpx2.RequestError, _TransientError) as error:
            failures = 1 if size_on_disk(part) - offset >= PROGRESS_BYTES else failures + 1
            reason = str(error) or type(error).__name__
            if failures == MAX_ATTEMPTS:
                raise UserError(
                    f"{file.path}: {MAX_ATTEMPTS} attempts failed, the last one with: {reason}", RUN_AGAIN
                ) from error
            requested = getattr(error, "wait_seconds", 0.0)
            wait = min(max(requested, RETRY_WAIT_SECONDS * 2 ** (failures - 1)), MAX_RETRY_WAIT_SECONDS)
            logger.warning("%s: %s; resuming at byte %d in %g s", file.path, reason, size_on_disk(part), wait)
            time.sleep(wait)
    return _move_into_place(file, part, target)


def verified_sha256(path: Path, file: HubFile) -> str:
    """SHA-256 of `path` if size and digest are those published by the hub, otherwise an empty string."""
    if size_on_disk(path) != file.size:
        return ""
    found = sha256(path)
    if len(file.digest) == 64 and found != file.digest:
        return ""
    if len(file.digest) == 40:  # git's blob id, published for small files only
        blob = hashlib.sha1(b"blob %d\0" % file.size + path.read_bytes(), usedforsecurity=False)
        return found if blob.hexdigest() == file.digest else ""
    return found


def size_on_disk(path: Path) -> int:
    """Bytes of a file, 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0


def _attempt(file: HubFile, url: str, part: Path, token: Secret, progress: Progress) -> None:
    """One request for the missing bytes, appended to those present."""
    offset = size_on_disk(part)
    headers = {"Accept-Encoding": "identity"}  # sizes and ranges count the bytes of the file itself
    if token:
        headers["Authorization"] = f"Bearer {token.value}"
    if offset:
        headers["Range"] = f"bytes={offset}-"
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
        _check_status(response, file, url, part)
        start = _body_offset(response, offset, part)
        _check_size(response, start, file)
        if start < offset:
            progress(start - offset)
        size = _append_body(response, part, start, file.size, progress)
    if size > file.size:
        part.unlink(missing_ok=True)
        raise UserError(f"{file.path}: the server sends more than the {file.size} bytes that the hub lists", RUN_AGAIN)
    if size < file.size:
        raise _TransientError("the connection was closed early")


def _append_body(response: httpx2.Response, part: Path, start: int, max_size: int, progress: Progress) -> int:
    """Write the body at `start`, and stop when it exceeds `max_size`; returns the size reached."""
    size = start
    with part.open("ab" if start else "wb") as stream:
        for block in response.iter_bytes():  # no chunk size: it would lose the bytes before a lost connection
            size += len(block)
            if size > max_size:
                break
            stream.write(block)
            progress(len(block))
    return size


def _check_status(response: httpx2.Response, file: HubFile, url: str, part: Path) -> None:
    status, host = response.status_code, response.url.host
    if status < 300:
        return
    if status == 416:  # the bytes present are not the start of this file
        part.unlink(missing_ok=True)
        raise _TransientError("the server cannot resume here")
    if status in TRANSIENT_STATUSES:
        wait = response.headers.get("Retry-After", "")
        raise _TransientError(f"{host} responds with status {status}", float(wait) if wait.isdecimal() else 0.0)
    if response.url.netloc != httpx2.URL(url).netloc:  # storage host; the hub gives the next attempt a new signed URL
        raise _TransientError(f"{host} responds with status {status}")
    if status in (401, 403):
        raise UserError(f"{file.path}: {host} denies access ({status})", SET_TOKEN)
    raise UserError(
        f"{file.path}: {host} responds with status {status}",
        "name another commit with --revision and another --output-dir",
    )


def _body_offset(response: httpx2.Response, offset: int, part: Path) -> int:
    """Where the body starts in the file. ModelScope answers a range with status 200, so only the header counts."""
    given = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    start = int(given[1]) if given else 0
    if start not in (0, offset) or (response.status_code == 206 and not given):
        part.unlink(missing_ok=True)
        raise _TransientError("the server sends another range than requested")
    return start


def _check_size(response: httpx2.Response, start: int, file: HubFile) -> None:
    """Reject a body of another length before writing it: an error page, an LFS pointer, another version."""
    length = response.headers.get("Content-Length", "")
    if not length.isdecimal() or "Content-Encoding" in response.headers or start + int(length) == file.size:
        return
    is_small = start == 0 and int(length) < MAX_LFS_POINTER_BYTES
    is_pointer = is_small and response.read().startswith(LFS_POINTER_PREFIX)
    offered = "a Git LFS pointer instead of the file" if is_pointer else f"{start + int(length)} bytes"
    raise UserError(
        f"{file.path}: the server offers {offered}, the hub lists {file.size} bytes",
        f"{RUN_AGAIN}, or use another source",
    )


def _move_into_place(file: HubFile, part: Path, target: Path) -> str:
    part.touch()  # an empty file has no bytes to write
    digest = verified_sha256(part, file)
    if not digest:
        part.unlink(missing_ok=True)
        raise UserError(f"{file.path} is damaged: its contents do not match the hub's digest", RUN_AGAIN)
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    part.replace(target)
    return digest
