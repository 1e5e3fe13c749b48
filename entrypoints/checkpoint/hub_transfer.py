"""One file from a URL into a folder: resumed, retried a bounded number of times, checked, then renamed into place.

`huggingface_hub` is not used for this: 2.4 throws a partial file away when a download fails or the process ends
(`_download_to_tmp_and_move`), so a cut connection near the end of a 2 GB shard would start it over.
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

from entrypoints.checkpoint.files import LFS_MARK
from entrypoints.checkpoint.hub_record import HubFile
from entrypoints.checkpoint.hub_sources import PASSING, SET_TOKEN, TIMEOUT
from entrypoints.checkpoint.manifest import sha256
from entrypoints.errors import UserError
from entrypoints.settings import Secret

logger = logging.getLogger(__name__)

ATTEMPTS = 6  # in a row that bring less than WORTHWHILE
WORTHWHILE = 8 << 20  # bytes
WAIT_SECONDS = 1.0  # before the second attempt; doubles
LONGEST_WAIT_SECONDS = 30.0
RUN_AGAIN = "run the same command again: it resumes"


class _Interrupted(Exception):
    """A fault that another attempt may mend."""

    def __init__(self, reason: str, wait_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds


def fetch(file: HubFile, url: str, folder: Path, token: Secret, advance: Callable[[int], object]) -> str:
    """Bring `file` into `folder`; returns its SHA-256.

    `advance` is told the bytes as they come, negative ones on a restart. The token goes to the host of `url` only,
    never to one that it redirects to. Raises UserError.
    """
    part = folder / f"{file.path}.part"
    if present(part) > file.size:
        part.unlink(missing_ok=True)
    advance(present(part))
    failures = 0
    while (have := present(part)) < file.size:
        try:
            _attempt(file, url, part, token, advance)
        except (httpx2.RequestError, _Interrupted) as error:
            failures = 1 if present(part) - have >= WORTHWHILE else failures + 1
            reason = str(error) or type(error).__name__
            if failures == ATTEMPTS:
                raise UserError(
                    f"{file.path}: {ATTEMPTS} attempts failed, the last one with: {reason}", RUN_AGAIN
                ) from error
            asked = getattr(error, "wait_seconds", 0.0)
            wait = min(max(asked, WAIT_SECONDS * 2 ** (failures - 1)), LONGEST_WAIT_SECONDS)
            logger.warning("%s: %s; going on at byte %d in %g s", file.path, reason, present(part), wait)
            time.sleep(wait)
    return _put_in_place(file, part, folder)


def checked(path: Path, file: HubFile) -> str:
    """SHA-256 of `path` if it is what the hub promises (size and, where it tells one, digest), else an empty string."""
    if present(path) != file.size:
        return ""
    found = sha256(path)
    if len(file.digest) == 64 and found != file.digest:
        return ""
    if len(file.digest) == 40:  # git's name for the contents; only small files have it
        blob = hashlib.sha1(b"blob %d\0" % file.size + path.read_bytes(), usedforsecurity=False)
        return found if blob.hexdigest() == file.digest else ""
    return found


def present(path: Path) -> int:
    """Bytes of a file that may be missing."""
    return path.stat().st_size if path.exists() else 0


def _attempt(file: HubFile, url: str, part: Path, token: Secret, advance: Callable[[int], object]) -> None:
    """One request for what is missing, written behind what is there."""
    have = present(part)
    headers = {"Accept-Encoding": "identity"}  # sizes and ranges count the bytes of the file itself
    if token:
        headers["Authorization"] = f"Bearer {token.value}"
    if have:
        headers["Range"] = f"bytes={have}-"
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
        _check_status(response, file, url, part)
        start = _start(response, have, part)
        _check_size(response, start, file)
        if start < have:
            advance(start - have)
        with part.open("ab" if start else "wb") as stream:
            size = start
            for block in response.iter_bytes():  # a chunk size would lose what came before a cut
                size += len(block)
                if size > file.size:
                    break
                stream.write(block)
                advance(len(block))
    if size > file.size:
        part.unlink(missing_ok=True)
        raise UserError(f"{file.path}: the server sends more than the {file.size} bytes that the hub lists", RUN_AGAIN)
    if size < file.size:
        raise _Interrupted("the connection was closed early")


def _check_status(response: httpx2.Response, file: HubFile, url: str, part: Path) -> None:
    status, host = response.status_code, response.url.host
    if status < 300:
        return
    if status == 416:  # what we have is no beginning of this file
        part.unlink(missing_ok=True)
        raise _Interrupted("the server cannot resume here")
    if status in PASSING:
        wait = response.headers.get("Retry-After", "")
        raise _Interrupted(f"{host} answers {status}", float(wait) if wait.isdecimal() else 0.0)
    if response.url.netloc != httpx2.URL(url).netloc:  # storage; the hub gives the next attempt a fresh address
        raise _Interrupted(f"{host} answers {status}")
    if status in (401, 403):
        raise UserError(f"{file.path}: {host} refuses access ({status})", SET_TOKEN)
    raise UserError(
        f"{file.path}: {host} answers {status}", "name another commit with --revision and another --output-dir"
    )


def _start(response: httpx2.Response, have: int, part: Path) -> int:
    """Where the body belongs. ModelScope answers a range with status 200, so the header counts, not the status."""
    given = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    start = int(given[1]) if given else 0
    if start not in (0, have) or (response.status_code == 206 and not given):
        part.unlink(missing_ok=True)
        raise _Interrupted("the server sends another range than asked for")
    return start


def _check_size(response: httpx2.Response, start: int, file: HubFile) -> None:
    """Refuse a body of another length before it is written: an error page, an LFS pointer, another version."""
    length = response.headers.get("Content-Length", "")
    if not length.isdecimal() or "Content-Encoding" in response.headers or start + int(length) == file.size:
        return
    pointer = start == 0 and int(length) < 1024 and response.read().startswith(LFS_MARK)
    what = "a Git LFS pointer instead of the file" if pointer else f"{start + int(length)} bytes"
    raise UserError(
        f"{file.path}: the server offers {what}, the hub lists {file.size} bytes", f"{RUN_AGAIN}, or use another source"
    )


def _put_in_place(file: HubFile, part: Path, folder: Path) -> str:
    part.touch()  # an empty file has no bytes to write
    digest = checked(part, file)
    if not digest:
        part.unlink(missing_ok=True)
        raise UserError(f"{file.path} arrived damaged: its contents are not what the hub promises", RUN_AGAIN)
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    part.replace(folder / file.path)
    return digest
