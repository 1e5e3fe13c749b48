"""Embeddings of texts through llama.cpp: one GGUF file, its own tokenizer and pooling, no torch."""

import logging
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrypoints.checkpoint.embedding_gguf import EmbeddingCheckpoint, open_embedding_gguf
from entrypoints.engines.llamacpp.cpu_features import load_cpu_code
from entrypoints.engines.llamacpp.server import aligned_context, common_parameters, launch, read_ahead
from entrypoints.errors import UserError
from entrypoints.hardware.resources import available_cpus, available_memory
from entrypoints.sizes import format_size

logger = logging.getLogger(__name__)
SLOTS = 4  # texts that an encoder computes together: twice as fast as one at a time for texts of 40 tokens
MAX_TOKENS = 8192  # of one text, as in OpenAI's models
BUFFER_BYTES = 16 * 4  # of one token and one dimension: 320 MB measured for 7,000 tokens of 768 dimensions
TOKEN_COUNT = re.compile(r"\((\d+) tokens\)")  # in llama.cpp's message for an input that is too long
CLOSED = "the engine was closed"


@dataclass(frozen=True)
class Embedding:
    """The normalized vector of one input, and the number of its tokens."""

    vector: list[float]
    tokens: int


class InputTooLong(UserError):
    """An input has more tokens than the model accepts; `tokens` is None if llama.cpp does not report the number."""

    def __init__(self, tokens: int | None, limit: int) -> None:
        super().__init__(f"the input has {tokens or 'too many'} tokens, the limit is {limit}", "split the text")


class EmbeddingEngine:
    """An embedding model in this process. Thread-safe: up to `slots` calls are computed together, others wait."""

    def __init__(self, checkpoint: EmbeddingCheckpoint, server: Any) -> None:
        self.slots = slots(checkpoint)
        self.max_tokens = max_tokens(checkpoint)
        self.size = checkpoint.size
        self.vocab_size = checkpoint.vocab_size
        self._server = server
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._running = 0

    @classmethod
    def load(cls, file: Path) -> "EmbeddingEngine":
        """Check and load a file. Raises UserError if it is not usable or memory is short."""
        load_cpu_code()  # rejects the CPU before it reads the file
        checkpoint = open_embedding_gguf(file)
        require_memory(checkpoint)
        logger.info(
            "loading %s (%s, %s pooling), %d dimensions, %d tokens",
            file, checkpoint.architecture, checkpoint.pooling, checkpoint.size, max_tokens(checkpoint),
        )  # fmt: skip
        read_ahead(file)
        engine = cls(checkpoint, launch(_parameters(checkpoint), file))
        engine.embed([0])  # also waits until the server's loop runs: closing it before that would hang
        return engine

    def embed(self, text: str | Sequence[int]) -> Embedding:
        """The embedding of a text, or of token ids, to which no special tokens are added.

        Raises InputTooLong, UserError if llama.cpp rejects the input, RuntimeError if it fails.
        """
        with self._lock:
            if self._server is None:
                raise RuntimeError(CLOSED)
            server = self._server
            self._running += 1
        try:
            reply = server.handle_embeddings({"input": text if isinstance(text, str) else [list(text)]})
        finally:
            del server
            with self._lock:
                self._running -= 1
                self._idle.notify_all()
        if "error" in reply:
            raise self._error(reply["error"])
        return Embedding(reply["data"][0]["embedding"], reply["usage"]["prompt_tokens"])

    def close(self) -> None:
        """Free the memory when the calls in progress have ended."""
        with self._lock:
            server, self._server = self._server, None
            self._idle.wait_for(lambda: self._running == 0)
        del server

    def _error(self, error: dict[str, Any]) -> Exception:
        message = str(error.get("message", error))
        if "too large to process" in message or "exceeds the available context size" in message:
            count = TOKEN_COUNT.search(message)
            return InputTooLong(int(count[1]) if count else None, self.max_tokens)
        if error.get("code") == 400:
            return UserError(f"llama.cpp rejected the input: {message}", "change the input")
        return RuntimeError(f"llama.cpp: {message}")


def slots(checkpoint: EmbeddingCheckpoint) -> int:
    """Texts computed together: one by a decoder, whose KV cache is large and computed once."""
    return 1 if checkpoint.is_causal else SLOTS


def max_tokens(checkpoint: EmbeddingCheckpoint) -> int:
    """Tokens of one text. A decoder leaves one token of its context window free."""
    return min(checkpoint.context_length - checkpoint.is_causal, MAX_TOKENS)


def needed_bytes(checkpoint: EmbeddingCheckpoint) -> int:
    """Bytes that the engine allocates: weights, KV cache of a decoder, buffers for one full batch."""
    tokens = aligned_context(max_tokens(checkpoint) + 1)
    buffers = BUFFER_BYTES * tokens * checkpoint.size
    return checkpoint.file.stat().st_size + slots(checkpoint) * tokens * checkpoint.cache_bytes + buffers


def require_memory(checkpoint: EmbeddingCheckpoint) -> None:
    """Raise UserError if less memory is available than the engine would allocate."""
    needed, available = needed_bytes(checkpoint), available_memory()
    if available < needed:
        raise UserError(
            f"{checkpoint.file} needs {format_size(needed)} of memory, {format_size(available)} are available",
            "free memory, or use a smaller model",
        )


def _parameters(checkpoint: EmbeddingCheckpoint) -> Any:
    """The xllamacpp.CommonParams of a server. A text is one batch, because pooling needs all of its states."""
    tokens = max_tokens(checkpoint)
    params = common_parameters(checkpoint.file, use_mmap=False, threads=available_cpus())
    params.embedding = True
    params.n_parallel = slots(checkpoint)
    params.n_ctx = params.n_parallel * (tokens + checkpoint.is_causal)
    params.n_batch = params.n_ubatch = tokens
    params.cache_ram_mib = 0
    return params
