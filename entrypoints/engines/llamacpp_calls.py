"""Calls of a running llama.cpp server: one thread each, results handed over as tokens."""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Sequence

from entrypoints.checkpoint.tokenizer import Tokenizer
from entrypoints.engines.base import Token
from entrypoints.errors import UserError

END = None  # a call's last word
CLOSED = "the engine was closed"
POLL_SECONDS = 0.1


class Calls:
    """All running calls of one server, so that they can be ended together."""

    def __init__(self, server: object, tokenizer: Tokenizer) -> None:
        self._server = server
        self._tokenizer = tokenizer
        self._running: set[_Call] = set()
        self._guard = threading.Lock()

    def stream(self, request: dict, cancelled: threading.Event | None = None) -> Generator[Token, None, None]:
        """Yield the tokens of one completion, the stop id among them if it came; closing or cancelling ends the call.

        Raises UserError for what llama.cpp refuses, RuntimeError for what fails in it.
        """
        call = self._begin(request, cancelled)
        told = 0
        try:
            while (chunk := call.next()) is not END:
                for token in self._tokens(chunk, told):
                    told += 1
                    yield token
        finally:
            call.left.set()

    def close(self) -> None:
        """End all calls with an error and free the server; returns when nothing of it runs any more."""
        with self._guard:
            running, self._server = list(self._running), None
        for call in running:
            call.closed.set()
        for call in running:
            call.thread.join()

    def _begin(self, request: dict, cancelled: threading.Event | None) -> "_Call":
        with self._guard:
            if self._server is None:
                raise RuntimeError(CLOSED)
            call = _Call(self._server, request, cancelled, self._forget)
            self._running.add(call)
            call.thread.start()
        return call

    def _forget(self, call: "_Call") -> None:
        with self._guard:
            self._running.discard(call)

    def _tokens(self, chunk: dict, told: int) -> list[Token]:
        """Tokens of one chunk of the stream.

        llama.cpp holds a token back while its bytes are no whole character, and then tells only the id that completes
        it, with the bytes of all: those before it are byte pieces. What it held back at the end it does not tell at
        all; the count is known, and padding stands for them. Drafted tokens come without odds.
        """
        if "error" in chunk:
            raise _error(chunk["error"])
        choice = chunk["choices"][0]
        if choice["logprobs"]:
            entry = choice["logprobs"]["content"][0]
            top = [(one["id"], one["logprob"]) for one in entry["top_logprobs"]]
            return [*self._held(entry["bytes"], entry["id"]), Token(entry["id"], entry["logprob"], top)]
        if choice["finish_reason"]:
            unseen_stop = choice["finish_reason"] == "stop"
            untold = chunk["usage"]["completion_tokens"] - told - unseen_stop
            return [Token(self._tokenizer.pad_id)] * untold
        if "__verbose" not in chunk or "prompt_progress" in chunk:
            return []
        drafted = chunk["__verbose"]["tokens"][0]
        return [*self._held(choice["text"].encode(), drafted), Token(drafted)]

    def _held(self, told: Sequence[int], token: int) -> list[Token]:
        """Tokens of the bytes that were told in front of this token's own."""
        return [Token(self._tokenizer.byte(byte)) for byte in told[: len(told) - len(self._tokenizer.piece(token))]]


class _Call:
    """One completion: its thread, its results, and the reasons to stop, which llama.cpp hears at its next word.

    It says none while it waits for a slot, so who waits here looks at the reasons from time to time.
    """

    def __init__(self, server: object, request: dict, cancelled: threading.Event | None, forget: Callable) -> None:
        self.left = threading.Event()  # nobody reads the results any more
        self.closed = threading.Event()  # with the engine
        self._cancelled = cancelled or threading.Event()
        self._results: queue.SimpleQueue = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, args=(server, request, forget), name="llama", daemon=True)

    def next(self) -> dict | None:
        """The next chunk, END after the last one or when cancelled; raises what failed."""
        while not (self._cancelled.is_set() or self.closed.is_set()):
            with contextlib.suppress(queue.Empty):
                result = self._results.get(timeout=POLL_SECONDS)
                if isinstance(result, BaseException):
                    raise result
                return result
        if self.closed.is_set():
            raise RuntimeError(CLOSED)
        return END

    def _work(self, server: object, request: dict, forget: Callable) -> None:
        try:
            server.handle_completions(request, self._receive)
        except BaseException as error:  # noqa: BLE001 - handed over to the caller's thread, which raises it
            self._results.put(error)
        finally:
            del server
            self._results.put(END)
            forget(self)

    def _receive(self, chunk: dict) -> bool:
        self._results.put(chunk)
        return self.left.is_set() or self._cancelled.is_set() or self.closed.is_set()


def _error(error: dict) -> Exception:
    message = error.get("message", str(error))
    if error.get("code") == 400:
        return UserError(f"llama.cpp refuses this: {message}", "change the request")
    return RuntimeError(f"llama.cpp: {message}")
