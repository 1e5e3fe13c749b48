"""Users of the pages: a file of names, password hashes and, for usage per user, API keys; reloaded when it changes.

A line is `NAME HASH [API-KEY]`; `#` starts a comment. `glm user` writes such lines. Passwords are hashed with scrypt; a
hash contains its parameters, so that hashes remain valid when the parameters here change.
"""

import base64
import binascii
import hashlib
import hmac
import re
import secrets
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from entrypoints.api.auth import FileVersion, file_version, open_private
from entrypoints.errors import UserError, read_remedy

MIN_PASSWORD = 8  # characters
MAX_PASSWORD = 1024
MAX_NAME = 64
LOG2_N, BLOCK_SIZE, PARALLELISM = 15, 8, 3  # of scrypt: 32 MiB, one of the choices that OWASP recommends
MAX_LOG2_N = 20
MAX_MEMORY = 256 << 20
SALT_BYTES, HASH_BYTES = 16, 32
_ENTRY = re.compile(r"(\S+)\s+(scrypt\$\S+)(?:\s+(\S+))?")
_HASH = re.compile(r"scrypt\$([0-9]{1,2})\$([0-9]{1,2})\$([0-9]{1,2})\$([A-Za-z0-9+/=]+)\$([A-Za-z0-9+/=]+)", re.ASCII)


@dataclass(frozen=True)
class PageUser:
    """A user; `api_key` is the key with which the page calls the API for this user, empty: that of the page."""

    name: str
    password_hash: str
    api_key: str = ""

    def line(self) -> str:
        """The entry of the users file."""
        return " ".join(part for part in (self.name, self.password_hash, self.api_key) if part) + "\n"


class UserFile:
    """The users of a file. A user who is removed from it, or whose password changes, is signed out."""

    def __init__(self, file: Path) -> None:
        """Raises UserError: the file cannot be read, or an entry is malformed."""
        self.file = file
        self._version: FileVersion | None = None
        self._users: dict[str, PageUser] = {}
        self._absent = hash_password(secrets.token_urlsafe())  # compared for unknown names, to take the same time
        self._load()

    def find(self, name: str) -> PageUser | None:
        """The user of this name as the file has it now; a file that became unreadable keeps the users of before."""
        if file_version(self.file) != self._version:
            try:
                self._load()
            except UserError:
                self._version = file_version(self.file)
        return self._users.get(normalized(name))

    def is_password(self, name: str, password: str) -> bool:
        """Whether it is the password of the user. Takes a tenth of a second, for unknown users too."""
        user = self.find(name)
        matches = verify_password(password, user.password_hash if user else self._absent)
        return matches and user is not None

    def _load(self) -> None:
        version = file_version(self.file)
        self._users = {user.name: user for user in read_users(self.file)}
        self._version = version


def read_users(file: Path) -> list[PageUser]:
    """Users of a file. Raises UserError: it cannot be read, an entry is malformed, or a name is there twice."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        remedy = read_remedy(error, f"{file}", "create it with glm user, or check --users-file")
        raise UserError(f"cannot read the users file {file} ({error})", remedy) from error
    users: dict[str, PageUser] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        parts = _ENTRY.fullmatch(entry)
        if not parts or not _is_hash(parts[2]):
            raise UserError(f"{file}:{number} is not a user: NAME HASH [API-KEY]", "add users with glm user")
        if parts[1] in users:
            raise UserError(f"{file}:{number} has the user {parts[1]} again", "delete one of the lines")
        users[parts[1]] = PageUser(normalized(parts[1]), parts[2], parts[3] or "")
    return list(users.values())


def put_user(file: Path, user: PageUser) -> None:
    """Add a user to the file, which is created if needed, or replace the entry of the same name.

    Raises UserError: the file is malformed or cannot be written.
    """
    _write(file, [*(_other_lines(file, user.name) if file.exists() else []), user.line()])


def remove_user(file: Path, name: str) -> bool:
    """Remove the entry of this name; False if there is none.

    Raises UserError: the file cannot be read, is malformed, or cannot be written.
    """
    if all(user.name != name for user in read_users(file)):
        return False
    _write(file, _other_lines(file, name))
    return True


def _other_lines(file: Path, name: str) -> list[str]:
    """The lines of the file without the entry of this name. Raises UserError: the file is malformed."""
    read_users(file)
    text = file.read_text(encoding="utf-8-sig").removesuffix("\n")
    lines = text.split("\n") if text else []  # `splitlines` would also split a comment, in which anything may stand
    return [f"{line}\n" for line in lines if normalized(line).split()[:1] != [name]]


def _write(file: Path, lines: list[str]) -> None:
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        with open(partial, "x", encoding="utf-8", opener=open_private) as stream:
            stream.write("".join(lines))
        if file.exists():
            partial.chmod(file.stat().st_mode & 0o777)
        partial.replace(file)
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror})", "choose another file") from error


def check_name(name: str) -> str:
    """The name in its normal form. Raises UserError: it has blanks, invisible characters or `#`, or is too long."""
    name = normalized(name)
    if not name or not name.isprintable() or name.split() != [name] or "#" in name or len(name) > MAX_NAME:
        problem = f"{name!r} is not a valid user name"
        raise UserError(problem, f"use at most {MAX_NAME} printable characters without blanks and #")
    return name


def check_password(password: str) -> None:
    """Raises UserError: the password is too short or too long."""
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        raise UserError(
            f"the password has {len(password)} characters", f"choose one of {MIN_PASSWORD} to {MAX_PASSWORD} characters"
        )


def hash_password(password: str) -> str:
    """A salted scrypt hash: `scrypt$LOG2_N$BLOCK_SIZE$PARALLELISM$SALT$HASH`."""
    salt = secrets.token_bytes(SALT_BYTES)
    derived = _derive(password, salt, (LOG2_N, BLOCK_SIZE, PARALLELISM))
    encoded = (base64.b64encode(part).decode() for part in (salt, derived))
    return "$".join(["scrypt", f"{LOG2_N}", f"{BLOCK_SIZE}", f"{PARALLELISM}", *encoded])


def verify_password(password: str, password_hash: str) -> bool:
    """Whether the password has this hash; False for a hash that is not one."""
    parts = _HASH.fullmatch(password_hash)
    if not parts or len(password) > MAX_PASSWORD:
        return False
    log2_n, block_size, parallelism = map(int, parts.groups()[:3])
    if not (0 < log2_n <= MAX_LOG2_N and block_size and parallelism):
        return False
    try:
        salt, expected = (base64.b64decode(text, validate=True) for text in parts.groups()[3:])
        derived = _derive(password, salt, (log2_n, block_size, parallelism))
    except (ValueError, binascii.Error, MemoryError):  # parameters that need more than MAX_MEMORY
        return False
    return hmac.compare_digest(derived, expected)


def normalized(text: str) -> str:
    """With composed characters: keyboards differ in how they compose them."""
    return unicodedata.normalize("NFC", text)


def _derive(password: str, salt: bytes, parameters: tuple[int, int, int]) -> bytes:
    log2_n, block_size, parallelism = parameters
    return hashlib.scrypt(
        normalized(password).encode("utf-8", "surrogateescape"),
        salt=salt, n=1 << log2_n, r=block_size, p=parallelism, maxmem=MAX_MEMORY, dklen=HASH_BYTES,
    )  # fmt: skip


def _is_hash(text: str) -> bool:
    return _HASH.fullmatch(text) is not None
