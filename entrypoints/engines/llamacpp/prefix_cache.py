"""Selects the slot of each answer, and keeps the KV caches of slots in files, so that they outlive the process.

Without it llama.cpp selects the slot, and keeps what it computed in memory only.
"""

import contextlib
import hashlib
import importlib.metadata
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from entrypoints.checkpoint.gguf_reader import GgufCheckpoint
from entrypoints.checkpoint.manifest import read_file_record
from entrypoints.engines.llamacpp.completions import CLOSED
from entrypoints.engines.llamacpp.prefix_store import PrefixState, PrefixStore, common_prefix
from entrypoints.engines.llamacpp.slot_files import SlotFiles
from entrypoints.engines.options import EngineOptions

logger = logging.getLogger(__name__)
MIN_TOKENS = 64  # a shorter prompt is computed faster than a file is hashed and read
POLL_SECONDS = 0.1  # how often a call that waits for a slot checks whether it was cancelled


@dataclass
class Slot:
    """One slot of llama.cpp, as this process knows it."""

    number: int
    tokens: list[int] = field(default_factory=list)  # of its KV cache
    owner: str | None = None  # whose prompt it computed
    is_saved: bool = True
    is_busy: bool = False
    last_use: int = 0


class PrefixCache:
    """Slots and their files. Thread-safe."""

    def __init__(self, store: PrefixStore, files: SlotFiles, slots: int) -> None:
        self._store, self._files = store, files
        self._slots = [Slot(number) for number in range(slots)]
        self._changed = threading.Condition()  # held to select a slot, never while llama.cpp works
        self._io = threading.Lock()  # held to use store and files
        self._uses = 0
        self._is_closed = False

    @contextlib.contextmanager
    def slot_for(self, prompt: Sequence[int], owner: str, cancelled: threading.Event | None) -> Iterator[Slot | None]:
        """A slot for one answer, with as much of the prompt as is known; append generated ids to its tokens.

        None if the call was cancelled while all slots were busy. A slot that changes its owner is emptied first, so
        that the time of an answer does not reveal what another client asked.
        """
        slot = self._wait_for_slot(np.asarray(prompt, np.int32), owner, cancelled)
        if slot is None:
            yield None
            return
        try:
            self._prepare(slot, prompt, owner)
            slot.tokens, slot.owner, slot.is_saved = list(prompt), owner, False
            yield slot
        finally:
            with self._changed:
                slot.is_busy = False
                self._changed.notify_all()

    def save(self) -> None:
        """Write what the idle slots have computed."""
        with self._io:
            self._save_idle()

    def close(self) -> None:
        """Write what is not written yet, and close the connection to llama.cpp; later calls raise RuntimeError."""
        with self._io:
            self._save_idle()
            self._is_closed = True
            self._files.close()

    def _save_idle(self) -> None:
        for slot in self._slots:
            if not slot.is_busy:  # one that is selected now waits in `_prepare`
                self._save(slot)

    def _wait_for_slot(self, prompt: np.ndarray, owner: str, cancelled: threading.Event | None) -> Slot | None:
        with self._changed:
            while not (idle := [slot for slot in self._slots if not slot.is_busy]):
                self._changed.wait(POLL_SECONDS)
                if cancelled and cancelled.is_set():
                    return None
            slot = max(idle, key=lambda one: (_known(one, prompt, owner), not one.tokens, -one.last_use))
            self._uses += 1
            slot.is_busy, slot.last_use = True, self._uses
            return slot

    def _prepare(self, slot: Slot, prompt: Sequence[int], owner: str) -> None:
        ids = np.asarray(prompt, np.int32)
        known = _known(slot, ids, owner)
        with self._io:
            if self._is_closed:
                raise RuntimeError(CLOSED)
            found = self._store.best(prompt, owner)
            is_better = found is not None and found[0] >= known + MIN_TOKENS
            if is_better or len(slot.tokens) - known >= MIN_TOKENS:  # they would be lost
                self._save(slot)
            if found and is_better and self._restore(slot, found[1]):
                return
            if slot.owner != owner and slot.tokens:
                self._files.erase(slot.number)
                slot.tokens = []

    def _restore(self, slot: Slot, state: PrefixState) -> bool:
        if not self._store.use(state):
            return False
        try:
            self._files.restore(slot.number, state.file.name)
        except RuntimeError as error:
            logger.warning("%s; its prompt is computed again", error)
            self._store.remove(state)
            slot.owner, slot.tokens = None, state.tokens.tolist()  # llama.cpp may have read some of them
            return False
        return True

    def _save(self, slot: Slot) -> None:
        if slot.is_saved or slot.owner is None or len(slot.tokens) < MIN_TOKENS:
            return
        try:
            self._store.add(slot.tokens, slot.owner, lambda name: self._files.save(slot.number, name))
        except (OSError, RuntimeError) as error:  # a full disk does not stop the service
            logger.warning("a prompt was not kept: %s", error)
        slot.is_saved = True


def open_store(checkpoint: GgufCheckpoint, options: EngineOptions) -> PrefixStore:
    """The states of this model, version of llama.cpp, number of slots and context length.

    Raises UserError: the folder, or the record of the model, cannot be used.
    """
    assert options.prefix_cache
    build = importlib.metadata.version("xllamacpp")
    # llama.cpp rejects a state that was written with another number of slots, or that is longer than a slot
    file = checkpoint.file.stat()  # the record says nothing of a file that was replaced without it
    model = f"{read_file_record(checkpoint.file).get('sha256')} {file.st_size} {file.st_mtime_ns}"
    text = f"{model} {build} {options.slots} {checkpoint.context_length}"
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    return PrefixStore(options.prefix_cache, fingerprint, options.prefix_cache_bytes)


def _known(slot: Slot, prompt: np.ndarray, owner: str) -> int:
    """Number of ids of the prompt that are in the slot and may be used."""
    return common_prefix(np.asarray(slot.tokens, np.int32), prompt) if slot.owner == owner else 0
