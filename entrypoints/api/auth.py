"""API keys: a file of hashed keys, read again when it changes, each with its own limits.

A line is `NAME SHA256 [requests-per-minute] [concurrent]`; `#` starts a comment. `glm key` writes such lines.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from pathlib import Path

from entrypoints.errors import UserError

REQUESTS_PER_MINUTE = 600
CONCURRENT = 64


@dataclass(frozen=True)
class Key:
    """Who may ask, and how much; `digest` is the SHA-256 of the key in hex."""

    name: str
    digest: str
    requests_per_minute: int = REQUESTS_PER_MINUTE
    concurrent: int = CONCURRENT


class KeyRing:
    """All keys; without any, every caller is let in as `anonymous`."""

    def __init__(self, file: Path | None = None, single: str = "") -> None:
        self._file = file
        self._single = [Key("default", digest(single))] if single else []
        self._stamp: tuple | None = None
        self._keys = [*self._single]
        self.refresh()

    @property
    def required(self) -> bool:
        """Must callers show a key?"""
        return bool(self._file or self._single)

    def refresh(self) -> None:
        """Read the file again if it changed.

        Raises UserError naming file and line of a malformed entry.
        """
        if self._file is None:
            return
        try:
            status = self._file.stat()
        except OSError as error:
            raise UserError(
                f"cannot read the key file {self._file} ({error.strerror})", "check --api-keys-file"
            ) from error
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if stamp != self._stamp:
            self._keys = [*self._single, *read_keys(self._file)]
            self._stamp = stamp

    def find(self, header: str | None) -> Key | None:
        """The key of an Authorization header; None when it is unknown. Takes the same time for every wrong key."""
        if not self.required:
            return Key("anonymous", "")
        scheme, _, token = (header or "").partition(" ")
        given = digest(token.strip() if scheme.lower() == "bearer" else "")
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, given):
                found = key
        return found


def read_keys(file: Path) -> list[Key]:
    """Keys of a file; raises UserError naming the line that is malformed."""
    keys = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            name, hashed, *limits = words
            if len(hashed) != 64 or len(limits) > 2 or int(hashed, 16) < 0:
                raise ValueError
            keys.append(Key(name, hashed.lower(), *(max(1, int(limit)) for limit in limits)))
        except ValueError:
            raise UserError(
                f"{file}:{number} is no key", "a line is NAME SHA256 [requests-per-minute] [concurrent]; see glm key"
            ) from None
    return keys


def new_key() -> str:
    """A fresh key with 256 random bits."""
    return f"glm-{secrets.token_urlsafe(32)}"


def digest(key: str) -> str:
    """What is stored of a key. The keys are random and long, so a plain hash cannot be searched."""
    return hashlib.sha256(key.encode()).hexdigest()
