"""API keys: a file of hashed keys, read again when it changes, each with its own limits.

A line is `NAME SHA256 [requests-per-minute] [concurrent]`; `#` starts a comment. `glm key` writes such lines.
"""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from entrypoints.errors import UserError

REQUESTS_PER_MINUTE = 600
CONCURRENT = 64
LINE = re.compile(r"(\S+)\s+([0-9A-Fa-f]{64})(?:\s+([1-9][0-9]{0,8}))?(?:\s+([1-9][0-9]{0,8}))?", re.ASCII)


@dataclass(frozen=True)
class Key:
    """Who may ask, and how much (None: as much as there is); `digest` is the SHA-256 of the key in hex."""

    name: str
    digest: str
    requests_per_minute: int | None = REQUESTS_PER_MINUTE
    concurrent: int | None = CONCURRENT


ANONYMOUS = Key("anonymous", "", None, None)


class KeyRing:
    """All keys; without file and single key, every caller is let in as ANONYMOUS."""

    def __init__(self, file: Path | None = None, single: str = "") -> None:
        self._file = file
        self._single = [Key("default", digest(single))] if single else []
        self._stamp: tuple | None = ()  # of the file as it was read; None: it could not be
        self._keys = [*self._single]
        self.refresh()

    @property
    def required(self) -> bool:
        """Must callers show a key?"""
        return bool(self._file or self._single)

    def refresh(self) -> None:
        """Read the file again if it changed.

        Raises UserError, once for each change, when it cannot be read or an entry is malformed; the keys stay then.
        """
        if self._file and (stamp := _stamp(self._file)) != self._stamp:
            self._stamp = stamp
            self._keys = [*self._single, *read_keys(self._file)]

    def find(self, header: str | None) -> Key | None:
        """The key of an Authorization header; None when it is unknown. Takes the same time for every wrong key."""
        if not self.required:
            return ANONYMOUS
        scheme, _, token = (header or "").partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else ""
        given, found = digest(token), None
        for key in self._keys:
            if hmac.compare_digest(key.digest, given):
                found = key
        return found if token else None  # the hash of nothing, written by mistake, lets nobody in


def read_keys(file: Path) -> list[Key]:
    """Keys of a file; raises UserError when it cannot be read, or naming the line that is malformed."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the key file {file} ({error})", "check --api-keys-file") from error
    keys = []
    for number, line in enumerate(text.split("\n"), start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        parts = LINE.fullmatch(entry)
        if not parts:
            raise UserError(
                f"{file}:{number} is no key", "a line is NAME SHA256 [requests-per-minute] [concurrent]; see glm key"
            )
        name, hashed, *limits = parts.groups()
        keys.append(Key(name, hashed.lower(), *(int(limit) for limit in limits if limit)))
    return keys


def new_key() -> str:
    """A fresh key with 256 random bits."""
    return f"glm-{secrets.token_urlsafe(32)}"


def digest(key: str) -> str:
    """What is stored of a key. The keys are random and long, so a plain hash cannot be searched."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _stamp(file: Path) -> tuple | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
