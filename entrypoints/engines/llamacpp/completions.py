"""Completions of a running llama.cpp server: one thread each, results returned as a stream of tokens."""

import contextlib
import queue
import threading
from collections.abc import Generator
from typing import Any

from entrypoints.checkpoint.tokenizer import Tokenizer
from entrypoints.engines.base import Token
from entrypoints.engines.llamacpp.held_back import HeldBackTokens
from entrypoints.engines.llamacpp.server import LlamaServer
from entrypoints.errors import UserError

CLOSED = "the engine was closed"
POLL_SECONDS = 0.1  # how often a waiting call checks whether it was cancelled
SELECTED_BY_LLAMACPP = -1  # as the number of a slot

Chunk = dict[str, Any]


class CompletionStreams:
    """All running completions of one server, so that they can be ended together."""

    def __init__(self, server: LlamaServer, tokenizer: Tokenizer) -> None:
        self._server: LlamaServer | None = server
        self._tokenizer = tokenizer
        self._held_back = HeldBackTokens(tokenizer)
        self._running: list[_Completion] = []  # and calls that have ended since the last one started
        self._lock = threading.Lock()

    def stream(self, request: dict[str, Any], cancelled: threading.Event | None = None) -> Generator[Token, None, None]:
        """Yield the tokens of one completion, including the stop token; closing or cancelling ends the call.

        A call that names its slot returns when llama.cpp has left the slot, at most one step later: until then the
        slot cannot be saved or emptied. Raises UserError if llama.cpp rejects the request, RuntimeError if it fails.
        """
        completion = self._start(request, cancelled)
        yielded = 0
        try:
            while (chunk := completion.next_chunk()) is not None:
                for token in self._tokens(chunk, yielded):
                    yielded += 1
                    yield token
        finally:
            completion.abandoned.set()
            is_own_thread = completion.thread is threading.current_thread()  # the garbage collector runs anywhere
            if request.get("id_slot", SELECTED_BY_LLAMACPP) != SELECTED_BY_LLAMACPP and not is_own_thread:
                completion.thread.join()

    def close(self) -> None:
        """End all calls with an error and free the server; returns when all threads have ended."""
        with self._lock:
            running, self._running, self._server = self._running, [], None
        for completion in running:
            completion.closed.set()
        for completion in running:
            completion.thread.join()

    def _start(self, request: dict[str, Any], cancelled: threading.Event | None) -> "_Completion":
        with self._lock:
            if self._server is None:
                raise RuntimeError(CLOSED)
            completion = _Completion(self._server, request, cancelled)
            completion.thread.start()
            self._running = [*(one for one in self._running if one.thread.is_alive()), completion]
        return completion

    def _tokens(self, chunk: Chunk, yielded: int) -> list[Token]:
        """Tokens of one chunk of the stream; `yielded`: tokens of the chunks before it.

        llama.cpp holds back tokens while their bytes are an incomplete character. It then reports only the id that
        completes the character, with the bytes of all; `HeldBackTokens` finds the others. Tokens that it still holds
        back at the end are never reported; their number is known, and padding tokens replace them. Drafted tokens
        have no probabilities, and the number of generated tokens runs ahead of them.
        """
        if "error" in chunk:
            raise _completion_error(chunk["error"])
        choice = chunk["choices"][0]
        if choice["logprobs"]:
            entry = choice["logprobs"]["content"][0]
            top = [(one["id"], one["logprob"]) for one in entry["top_logprobs"]]
            generated = chunk.get("timings", {}).get("predicted_n")
            count = generated - yielded - 1 if generated and "__verbose" not in chunk else None
            held = self._held_back.before(bytes(entry["bytes"]), entry["id"], count)
            return [*map(Token, held), Token(entry["id"], entry["logprob"], top)]
        if choice["finish_reason"]:
            unreported_stop = choice["finish_reason"] == "stop"
            missing: int = chunk["usage"]["completion_tokens"] - yielded - unreported_stop
            return [Token(self._tokenizer.pad_id)] * missing
        if "__verbose" not in chunk or "prompt_progress" in chunk:
            return []
        drafted = chunk["__verbose"]["tokens"][0]
        return [*map(Token, self._held_back.before(choice["text"].encode(), drafted, None)), Token(drafted)]


class _Completion:
    """One call of llama.cpp: its thread, its results, and the events that end it.

    llama.cpp checks the events after each chunk. It sends none while the call waits for a slot, so the reader polls.
    """

    def __init__(self, server: LlamaServer, request: dict[str, Any], cancelled: threading.Event | None) -> None:
        self.abandoned = threading.Event()  # the reader has stopped reading
        self.closed = threading.Event()  # the engine was closed
        self._cancelled = cancelled or threading.Event()
        self._results: queue.SimpleQueue[Chunk | BaseException | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, args=(server, request), name="llama", daemon=True)

    def next_chunk(self) -> Chunk | None:
        """The next chunk; None after the last one or when cancelled. Raises the error of the call if it failed."""
        while not (self._cancelled.is_set() or self.closed.is_set()):
            with contextlib.suppress(queue.Empty):
                result = self._results.get(timeout=POLL_SECONDS)
                if isinstance(result, BaseException):
                    raise result
                return result
        if self.closed.is_set():
            raise RuntimeError(CLOSED)
        return None

    def _work(self, server: LlamaServer, request: dict[str, Any]) -> None:
        try:
            if not self._is_ended():
                server.handle_completions(request, self._receive)
        except BaseException as error:  # noqa: BLE001 - raised again in the reader's thread
            self._results.put(error)
        finally:
            self._results.put(None)

    def _receive(self, chunk: Chunk) -> bool:
        """Take one chunk; True stops the call."""
        self._results.put(chunk)
        return self._is_ended()

    def _is_ended(self) -> bool:
        return self.abandoned.is_set() or self._cancelled.is_set() or self.closed.is_set()


def _completion_error(error: dict[str, Any]) -> Exception:
    message = error.get("message", str(error))
    if error.get("code") == 400:
        return UserError(f"llama.cpp rejected the request: {message}", "change the request")
    return RuntimeError(f"llama.cpp: {message}")
