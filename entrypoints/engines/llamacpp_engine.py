"""The engine of llama.cpp, through xllamacpp: one GGUF file, several answers at once, no torch.

llama.cpp gets token ids and gives token ids; prompts, stop ids and text stay ours. Its own HTTP listener cannot be left
out, so it listens on a socket file that is removed at once: nobody can connect.
Frequency and presence penalty count the prompt's tokens too, unlike the other engines'.
"""

import logging
import os
import secrets
import tempfile
import threading
import weakref
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from entrypoints.checkpoint.gguf import GgufCheckpoint, open_gguf
from entrypoints.checkpoint.layout import Shape
from entrypoints.engines.base import Token
from entrypoints.engines.json_grammar import json_grammar
from entrypoints.engines.llamacpp_build import require_processor
from entrypoints.engines.llamacpp_calls import Calls
from entrypoints.engines.machine import available_cpus, available_memory, freed_memory_kept
from entrypoints.errors import UserError
from entrypoints.prompt import PromptFormat
from entrypoints.sampling import Sampling

logger = logging.getLogger(__name__)
PAGE = 256  # llama.cpp rounds a slot's window up to this
BLOCK = 1 << 20  # bytes that are read at once; where the first of them is in memory all are taken to be
LOOKED_UP, DRAFTED = 4, 8  # tokens that must stand somewhere before, and how many are taken from behind them
BATCH = 128  # prompt tokens read in one step; between two steps the other answers go on, and a call can be cancelled
HALF = 2  # bytes of a number in half precision
ROOM = 16 << 20  # threads, its HTTP server and what a toy is computed in: 10 MB with the demo's
RANDOM_SEED = (1 << 32) - 1  # what llama.cpp takes for "another one each time"
ERRORS_ONLY, INFORMATION = 1, 3  # its log levels; at neither does it print what is asked


class LlamaCppEngine:
    """A GGUF model in this process; calls beyond `slots` wait inside llama.cpp."""

    name = "llamacpp"
    broken = None  # a crash of llama.cpp ends the process
    features = frozenset(
        {"seed", "top_logprobs", "repetition_penalty", "frequency_penalty", "presence_penalty", "json_schema"}
    )

    def __init__(
        self, checkpoint: GgufCheckpoint, server: object, slots: int, window: int, speculative: bool = False
    ) -> None:
        self.tokenizer = checkpoint.tokenizer
        self.prompt_format = checkpoint.prompt_format
        self.adapters: dict[str, PromptFormat] = {}
        self.slots = slots
        self.window = window
        self._rows = checkpoint.shape.vocabulary
        self._speculative = speculative
        if speculative:  # llama.cpp computes no odds for what it drafted
            self.features -= {"top_logprobs"}
        self._calls = Calls(server, checkpoint.tokenizer)
        # also at the interpreter's exit: a thread that is still inside llama.cpp then would crash it
        self._close = weakref.finalize(self, self._calls.close)

    @classmethod
    def load(
        cls,
        file: Path,
        slots: int = 4,
        window: int | None = None,
        threads: int | None = None,
        in_place: bool = False,
        speculative: bool = False,
    ) -> "LlamaCppEngine":
        """Check and load a file made by `glm quantize`.

        window: tokens of each slot, the file's own if not given. threads: as many as this process may use if not given.
        in_place: use the weights as they lie in the file, in pages that the system may take back: little memory, slow.
        speculative: where the last tokens stand in the conversation already, draft those behind them and verify all in
        one step (prompt lookup). No answer changes but by rounding; logprobs cannot be had.
        Raises UserError when the file is not usable, the window is larger than the model's, or memory is short.
        """
        require_processor()
        checkpoint = open_gguf(file)
        window = checkpoint.window if window is None else window
        if not 1 < window <= checkpoint.window or slots < 1:
            raise UserError(
                f"window {window} with {slots} slots cannot be had of {file}",
                f"the window is at most {checkpoint.window}, slots at least 1",
            )
        require_memory(checkpoint, slots, window, in_place)
        tokens = slots * _whole_pages(window)
        threads = threads or available_cpus()
        logger.info("loading %s (%s), %d slots of %d tokens, %d threads", file, checkpoint.type, slots, window, threads)
        if not in_place:
            _read_ahead(file)
        server = _start(checkpoint, tokens, slots, threads, in_place, speculative)
        engine = cls(checkpoint, server, slots, window, speculative)
        # the first token warms the model up; and a server that is closed before its loop has begun would never end
        list(engine.generate([checkpoint.tokenizer.pad_id], Sampling(max_new_tokens=1)))
        return engine

    def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: str | None = None,
        cancelled: threading.Event | None = None,
    ) -> Generator[Token, None, None]:
        """Yield the answer's tokens, without the stop id; closing or cancelling frees the slot within a token."""
        if adapter is not None:
            raise UserError(f"a GGUF model has no adapter {adapter!r}", "merge it in: glm quantize --adapter")
        if len(prompt) >= self.window:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, the window {self.window}", "shorten the conversation"
            )
        most = min(sampling.max_new_tokens, self.window - len(prompt))
        request = _request(prompt, sampling, most)
        if self._speculative:
            request["verbose"] = True  # tells the ids of drafted tokens too
        tokens = self._calls.stream(request, cancelled)
        try:
            for count, token in enumerate(tokens, start=1):
                if token in self.tokenizer.stop_ids:
                    return
                yield _as_asked(token, sampling.top_logprobs)
                if count >= most:  # llama.cpp goes on to the end of a character
                    return
        finally:
            tokens.close()

    def greedy(self, prompt: Sequence[int], most: int, likeliest: int) -> list[Token]:
        """The likeliest answer, a stop id included, each token with so many of the likeliest in its place.

        What llama.cpp does not tell of (see `Calls`) has no logprob.
        """
        request = _request(prompt, Sampling(max_new_tokens=most, temperature=0), most)
        found = []
        for token in self._calls.stream(request | {"n_probs": min(likeliest, self._rows)}):
            found.append(token)
            if token in self.tokenizer.stop_ids or len(found) == most:
                break
        return found

    def generate_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """Answers to several prompts, `slots` at a time, without their stop ids."""
        with ThreadPoolExecutor(self.slots) as pool:
            return list(pool.map(lambda prompt: list(map(int, self.generate(prompt, sampling))), prompts))

    def close(self) -> None:
        """End running calls with an error, and give the memory back."""
        self._close()


def slot_bytes(shape: Shape, window: int) -> int:
    """Memory of one slot's keys and values."""
    return shape.cache_bytes(_whole_pages(window))


def needed_bytes(shape: Shape, size: int, slots: int, window: int, in_place: bool = False) -> int:
    """Memory that the engine takes for a file of `size` bytes, beside what the process has before.

    A window for each slot and one on the shelf (`_parameters`), ROOM, and what it holds twice while it loads, up to the
    embedding in half precision: 0.40 GB at most in f16, 0.32 in q8_0, 0.23 in q4_0 with 4 layers of the 6B's width.
    """
    kept = (slots + 1) * slot_bytes(shape, window) + ROOM
    return kept if in_place else kept + size + HALF * shape.vocabulary * shape.hidden


def require_memory(checkpoint: GgufCheckpoint, slots: int, window: int, in_place: bool = False) -> None:
    """Raise UserError where less is available than the engine would take."""
    needed = needed_bytes(checkpoint.shape, checkpoint.file.stat().st_size, slots, window, in_place)
    if (available := available_memory()) < needed:
        raise UserError(
            f"{checkpoint.file} with {slots} slots of {window} tokens needs {needed / 1e9:.1f} GB of memory, "
            f"{available / 1e9:.1f} GB are available",
            "free memory, or use fewer slots or a smaller type",
        )


def _whole_pages(window: int) -> int:
    return -(-window // PAGE) * PAGE


def _as_asked(token: Token, most: int | None) -> Token:
    return Token(token) if most is None else Token(token, token.logprob, token.top[:most])


def _request(prompt: Sequence[int], sampling: Sampling, most: int) -> dict:
    seed = {} if sampling.seed is None else {"seed": sampling.seed % RANDOM_SEED}
    grammar = {} if sampling.json_schema is None else {"grammar": json_grammar(sampling.json_schema)}
    return {
        "prompt": list(prompt),
        "stream": True,
        "return_progress": True,  # a word after each step of reading the prompt, at which the call can be cancelled
        "n_predict": most,
        "n_probs": max(1, sampling.top_logprobs or 0),  # without them this route does not tell ids
        # in the order of transformers; all others that llama.cpp has on by default stay out. Greedy is the first of the
        # likeliest: top_p would sort the whole vocabulary for each token
        "samplers": ["penalties", "top_k"] if sampling.greedy else ["penalties", "temperature", "top_k", "top_p"],
        "temperature": 1.0 if sampling.greedy else sampling.temperature,
        "top_k": 1 if sampling.greedy else sampling.top_k or 0,
        "top_p": sampling.top_p,
        "repeat_penalty": sampling.repetition_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "repeat_last_n": len(prompt) + most,
        **seed,
        **grammar,
    }


def _read_ahead(file: Path) -> None:
    """Bring the file into memory: llama.cpp keeps all of Python waiting while it loads, and /healthz must answer."""
    block = bytearray(BLOCK)
    with file.open("rb", buffering=0) as stream:
        for place in range(0, file.stat().st_size, BLOCK):
            if not _in_memory(stream.fileno(), place):
                stream.seek(place)
                stream.readinto(block)


def _in_memory(descriptor: int, place: int) -> bool:
    """Whether the byte at `place` can be had without the disk; False where the system does not tell."""
    try:
        return os.preadv(descriptor, [bytearray(1)], place, os.RWF_NOWAIT) == 1
    except (AttributeError, OSError):
        return False


def _start(
    checkpoint: GgufCheckpoint,
    tokens: int,
    slots: int,
    threads: int,
    in_place: bool = False,
    speculative: bool = False,
) -> object:
    try:
        import xllamacpp
    except ImportError as error:
        raise UserError("this needs the package xllamacpp", "pip install 'glm-entrypoints[quantized]'") from error
    params = _parameters(checkpoint, tokens, slots, threads, in_place, speculative)
    with tempfile.TemporaryDirectory(prefix="glm-") as folder:  # of mode 0700; gone with the socket when all is loaded
        params.hostnames = [f"{folder}/llama.sock"]
        try:
            with freed_memory_kept():  # of one tensor's bytes for the next one's
                return xllamacpp.Server(params)
        except RuntimeError as error:
            told = f"llama.cpp cannot load {checkpoint.file} ({error})"
            raise UserError(told, "its own words are on stderr") from error


def _parameters(
    checkpoint: GgufCheckpoint, tokens: int, slots: int, threads: int, in_place: bool, speculative: bool
) -> object:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(checkpoint.file)
    params.n_ctx = tokens
    params.n_parallel = slots
    params.n_batch = params.n_ubatch = max(BATCH, slots * (1 + speculative * DRAFTED))
    params.ctx_shift = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    # a slot that goes to another conversation puts what it has read on a shelf of one slot's size, from where any slot
    # takes what its prompt begins with; llama.cpp's own shelf of 8 GiB would not be seen coming
    params.cache_ram_mib = max(1, checkpoint.shape.cache_bytes(tokens // slots) >> 20)
    if speculative:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
        params.speculative.ngram_simple.size_n, params.speculative.ngram_simple.size_m = LOOKED_UP, DRAFTED
    params.fit_params = False  # what was asked for, or an error
    params.offline = True
    params.warmup = False
    # it copies the weights into the order that its arithmetic likes best, 1.2 times as fast; mapping them too would
    # leave both copies resident, 7.2 GB instead of 4.1 for the 6B in q4_0
    mode = xllamacpp.llama_load_mode
    params.load_mode = mode.LLAMA_LOAD_MODE_MMAP if in_place else mode.LLAMA_LOAD_MODE_NONE
    params.no_extra_bufts = in_place
    params.verbosity = INFORMATION if logger.isEnabledFor(logging.DEBUG) else ERRORS_ONLY
    params.ui = params.endpoint_slots = params.endpoint_props = params.endpoint_metrics = False
    params.n_threads_http = 1
    params.api_keys = [secrets.token_urlsafe(32)]  # should a later version not know socket files
    return params
