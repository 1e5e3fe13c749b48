"""API keys: a file of hashed keys, reloaded when it changes; each key has its own limits.

A line is `NAME SHA256 [requests-per-minute] [concurrent] [tokens-per-day]`; `#` starts a
comment. `glm key` writes such lines.
"""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from entrypoints.errors import UserError, read_remedy

DEFAULT_REQUESTS_PER_MINUTE = 600
DEFAULT_MAX_CONCURRENT = 64
LIMIT = r"(?:\s+([1-9][0-9]{0,8}))?"
KEY_ENTRY = re.compile(rf"(\S+)\s+([0-9A-Fa-f]{{64}}){LIMIT}{LIMIT}(?:\s+([1-9][0-9]{{0,14}}))?", re.ASCII)

FileVersion = tuple[int, int, int]  # modification time in ns, size in bytes, inode


@dataclass(frozen=True)
class ApiKey:
    """Name and limits of a client (None: unlimited); `digest` is the SHA-256 of the key in hex."""

    name: str
    digest: str
    requests_per_minute: int | None = DEFAULT_REQUESTS_PER_MINUTE
    concurrent: int | None = DEFAULT_MAX_CONCURRENT
    tokens_per_day: int | None = None


ANONYMOUS = ApiKey("anonymous", "", None, None)


class KeyRing:
    """All API keys. Without a file and a single key, every client is accepted as ANONYMOUS."""

    def __init__(self, file: Path | None = None, single: str = "", quotas: bool = True) -> None:
        """quotas: accept a limit of tokens per day, which needs a ledger. Raises UserError as `refresh` does."""
        self._file = file
        self._quotas = quotas
        self._single = [ApiKey("default", digest(single))] if single else []
        self._is_loaded = False
        self._loaded_version: FileVersion | None = None  # None: the file was not readable
        self._keys = [*self._single]
        self.refresh()

    @property
    def required(self) -> bool:
        """Whether clients must send a key."""
        return bool(self._file or self._single)

    def refresh(self) -> None:
        """Reload the file if it changed.

        Raises UserError, once per change, when it cannot be read or an entry is malformed; the old keys stay valid.
        """
        if not self._file:
            return
        version = file_version(self._file)
        if self._is_loaded and version == self._loaded_version:
            return
        self._is_loaded, self._loaded_version = True, version
        keys = read_keys(self._file)
        limited = [key.name for key in keys if key.tokens_per_day is not None]
        if limited and not self._quotas:
            problem = f"{self._file}: {limited[0]} has a limit of tokens per day, which is counted from a ledger"
            raise UserError(problem, "start glm serve with --usage-dir")
        self._keys = [*self._single, *keys]

    def find(self, header: str | None) -> ApiKey | None:
        """The key of an Authorization header; None if it is unknown. Takes the same time for every wrong key."""
        if not self.required:
            return ANONYMOUS
        scheme, _, token = (header or "").partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else ""
        given, found = digest(token), None
        for key in self._keys:
            if hmac.compare_digest(key.digest, given):
                found = key
        return found if token else None  # an entry with the hash of the empty string must not accept an empty token


def read_keys(file: Path) -> list[ApiKey]:
    """Keys of a file; raises UserError when it cannot be read or a line is malformed."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        remedy = read_remedy(error, f"{file}", "check --api-keys-file")
        raise UserError(f"cannot read the key file {file} ({error})", remedy) from error
    keys = []
    for number, line in enumerate(text.split("\n"), start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        parts = KEY_ENTRY.fullmatch(entry)
        if not parts:
            raise UserError(
                f"{file}:{number} is not a valid key entry",
                "use the format NAME SHA256 [requests-per-minute] [concurrent] [tokens-per-day]; see glm key",
            )
        name, hashed, *limits = parts.groups()
        keys.append(ApiKey(name, hashed.lower(), *(int(limit) for limit in limits if limit)))
    return keys


def new_key() -> str:
    """A new key with 256 random bits."""
    return f"glm-{secrets.token_urlsafe(32)}"


def digest(key: str) -> str:
    """The SHA-256 that is stored for a key. Keys have 256 random bits, so an unsalted hash cannot be brute-forced."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def add_key(file: Path, name: str, limits: Sequence[int] = ()) -> str:
    """Append a new key to a key file, which is created if needed; returns the key, which the file has as a hash only.

    Raises UserError: an invalid or duplicate name, or a file that cannot be read or written.
    """
    if not name.isprintable() or name.split() != [name] or "#" in name:
        raise UserError(f"{name!r} is not a valid key name", "use printable characters without blanks and #")
    if file.is_file() and any(key.name == name for key in read_keys(file)):
        raise UserError(f"{file} already has a key named {name}", "choose another name, or delete its line")
    key = new_key()
    try:
        with open(file, "a+", encoding="utf-8", opener=open_private) as stream:
            stream.seek(0)
            text = stream.read()
            separator = "\n" if text and not text.endswith("\n") else ""
            stream.write(separator + " ".join([name, digest(key), *map(str, limits)]) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror})", "choose another file") from error
    return key


def open_private(path: str, flags: int) -> int:
    """An opener that creates a file readable only by its owner."""
    return os.open(path, flags, 0o600)


def file_version(file: Path) -> FileVersion | None:
    """A value that differs when the content of the file does; None without a file."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
