"""KV caches of prompts on disk, so that a restarted server does not compute them again.

A state consists of llama.cpp's file and a JSON record with the owner, the token ids and the SHA-256 of that file. Files
are written under another name first: a state is complete or not there. All builds and models of a folder share its size
limit; the least recently used states are removed first.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entrypoints.checkpoint.manifest import sha256
from entrypoints.errors import UserError
from entrypoints.untrusted import read_json_file

logger = logging.getLogger(__name__)
OPERATOR = "\0operator"  # owner of the prompts that every client may use; no API key has this name
ABANDONED_SECONDS = 3600  # a state is written in seconds
STATE_SUFFIX, RECORD_SUFFIX, PARTIAL_SUFFIX = ".state", ".json", ".partial"
OWN_NAME = re.compile("[0-9a-f]{32}")  # of subfolders, and of files without their suffix


@dataclass(frozen=True)
class PrefixState:
    """One state: who may use it, its token ids, its file, and the SHA-256 of the file."""

    owner: str  # hashed
    tokens: np.ndarray
    file: Path
    digest: str

    @property
    def record(self) -> Path:
        """The file that describes it."""
        return self.file.with_suffix(RECORD_SUFFIX)


class PrefixStore:
    """The states of one model and build in a subfolder of `folder`. Not thread-safe."""

    def __init__(self, folder: Path, fingerprint: str, max_bytes: int) -> None:
        """Read the records. Raises UserError: the folder cannot be used."""
        self._all, self._max_bytes = folder, max_bytes
        self.folder = folder / fingerprint[:32]
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as probe:  # it can be written
                self._require_private(os.fstat(probe.fileno()).st_uid)
            self._remove_abandoned()
            self._states = [state for record in self.folder.glob(f"*{RECORD_SUFFIX}") if (state := _read(record))]
            self._remove_oldest()
        except OSError as error:
            raise UserError(
                f"--prefix-cache {folder} cannot be used ({error})", "choose a folder that is writable"
            ) from error

    def _require_private(self, user: int) -> None:
        """Raise UserError if another user made the subfolder, who could read and replace what is in it.

        user: the owner of files that this process creates there, which is another one on some network file systems.
        """
        status = self.folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != user:
            raise UserError(
                f"--prefix-cache {self._all}: {self.folder.name} in it is not a folder of uid {user}",
                "delete it, or choose a folder in which no other user can write",
            )
        self.folder.chmod(0o700)

    def best(self, prompt: Sequence[int], owner: str) -> tuple[int, PrefixState] | None:
        """The state that shares the most ids with the start of the prompt, of this owner or the operator."""
        owners = {_hashed(owner), _hashed(OPERATOR)}
        ids = np.asarray(prompt, np.int32)
        found = [(common_prefix(ids, state.tokens), state) for state in self._states if state.owner in owners]
        return max(found, key=lambda pair: pair[0], default=None)

    def use(self, state: PrefixState) -> bool:
        """Is the file intact? Marks it as used if so, else removes it."""
        try:
            if sha256(state.file) == state.digest:
                os.utime(state.file)
                return True
            logger.warning("%s does not match its SHA-256; its prompt is computed again", state.file)
        except FileNotFoundError:  # another server removed it
            pass
        except OSError as error:
            logger.warning("%s cannot be used (%s); its prompt is computed again", state.file, error)
        self.remove(state)
        return False

    def add(self, tokens: Sequence[int], owner: str, write: Callable[[str], int]) -> None:
        """Keep a state, and remove those that it continues.

        write: writes the file of this name into `self.folder`, and returns how many of the tokens it contains.
        """
        ids, hashed = np.asarray(tokens, np.int32), _hashed(owner)
        partial = self.folder / f"{_name(hashed, ids)}{PARTIAL_SUFFIX}"
        with contextlib.ExitStack() as stack:
            stack.callback(partial.unlink, missing_ok=True)
            ids = ids[: write(partial.name)]
            partial.chmod(0o600)
            file = self.folder / f"{_name(hashed, ids)}{STATE_SUFFIX}"
            state = PrefixState(hashed, ids, file, sha256(partial))
            for old in [one for one in self._states if one.owner == hashed and _continues(ids, one.tokens)]:
                self.remove(old)
            partial.replace(state.file)
            text = json.dumps({"owner": hashed, "sha256": state.digest, "tokens": ids.tolist()})
            partial.write_text(text, encoding="utf-8")
            partial.chmod(0o600)
            partial.replace(state.record)
            self._states.append(state)
        self._remove_oldest()

    def remove(self, state: PrefixState) -> None:
        """Forget a state."""
        self._states = [one for one in self._states if one is not state]
        for file in (state.record, state.file):
            with contextlib.suppress(OSError):  # a folder that has become read-only does not stop the service
                file.unlink(missing_ok=True)

    def _files_of_all(self, suffix: str) -> list[Path]:
        """The files of all models and builds; the folder may have files of other programs."""
        files = self._all.glob(f"*/*{suffix}")
        return [file for file in files if OWN_NAME.fullmatch(file.parent.name) and OWN_NAME.fullmatch(file.stem)]

    def _remove_abandoned(self) -> None:
        """Remove what a process of any model or build left when it died while it was writing."""
        for partial in self._files_of_all(PARTIAL_SUFFIX):
            with contextlib.suppress(FileNotFoundError):  # another server finished it
                if time.time() - partial.stat().st_mtime > ABANDONED_SECONDS:
                    partial.unlink()

    def _remove_oldest(self) -> None:
        sizes = {}
        for file in self._files_of_all(STATE_SUFFIX):
            with contextlib.suppress(FileNotFoundError):  # another server removed it
                sizes[file] = file.stat()
        total = sum(status.st_size for status in sizes.values())
        for file, status in sorted(sizes.items(), key=lambda item: item[1].st_mtime):
            if total <= self._max_bytes:
                return
            total -= status.st_size
            for each in (file.with_suffix(RECORD_SUFFIX), file):
                each.unlink(missing_ok=True)
            self._states = [one for one in self._states if one.file != file]


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """Number of equal ids at the start of both."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length


def _continues(tokens: np.ndarray, earlier: np.ndarray) -> bool:
    return common_prefix(tokens, earlier) == len(earlier)


def _name(owner: str, ids: np.ndarray) -> str:
    """Name of the files of these ids of a hashed owner."""
    return hashlib.sha256(owner.encode() + ids.tobytes()).hexdigest()[:32]


def _hashed(owner: str) -> str:
    return hashlib.sha256(owner.encode()).hexdigest()


def _read(record: Path) -> PrefixState | None:
    """The state of a record; None if it is damaged or has no file, which then goes with it."""
    file = record.with_suffix(STATE_SUFFIX)
    try:
        fields = read_json_file(record)
        tokens = np.asarray(fields["tokens"], np.int32)
        if tokens.ndim == 1 and file.is_file():
            return PrefixState(str(fields["owner"]), tokens, file, str(fields["sha256"]))
    except (UserError, KeyError, TypeError, ValueError, OverflowError) as error:
        logger.warning("%s is damaged (%s); its prompt is computed again", record, error)
    for each in (record, file):
        each.unlink(missing_ok=True)
    return None
