"""Starts the llama.cpp server of a GGUF file inside this process."""

import logging
import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from entrypoints.checkpoint.gguf_reader import GgufCheckpoint
from entrypoints.engines.llamacpp.cpu_features import load_cpu_code
from entrypoints.engines.llamacpp.slot_files import SOCKET_NAME, SlotFiles
from entrypoints.engines.options import EngineOptions
from entrypoints.errors import UserError
from entrypoints.hardware.resources import available_cpus, retain_freed_memory

logger = logging.getLogger(__name__)
SLOT_ALIGNMENT_TOKENS = 256  # llama.cpp rounds the context of a slot up to a multiple of this
READ_BLOCK_BYTES = 1 << 20  # a block counts as cached if its first byte is in the page cache
LOOKUP_TOKENS, DRAFT_TOKENS = 4, 8  # n-gram that must repeat the conversation, and tokens drafted after it
BATCH_TOKENS = 128  # prompt tokens per step; between steps other answers advance, and a call can be cancelled
LOG_ERRORS, LOG_INFO = 1, 3  # llama.cpp's log levels; neither logs prompts


class LlamaServer(Protocol):
    """The part of xllamacpp.Server that is used."""

    def handle_completions(self, request: dict[str, Any], receive: Callable[[dict[str, Any]], bool | None]) -> None:
        """Run one completion; passes each chunk to `receive` and stops when it returns True."""


def aligned_context(context_length: int) -> int:
    """Tokens that llama.cpp allocates for a slot of this context length."""
    return -(-context_length // SLOT_ALIGNMENT_TOKENS) * SLOT_ALIGNMENT_TOKENS


def start_server(
    checkpoint: GgufCheckpoint, options: EngineOptions, slot_files: SlotFiles | None = None
) -> LlamaServer:
    """Load the weights and start llama.cpp's threads. Raises UserError as `launch`."""
    if not options.use_mmap:
        read_ahead(checkpoint.file)
    params = _parameters(checkpoint, options)
    if slot_files:
        slot_files.configure(params)
        params.cache_ram_mib = 0  # it would return to a client what another one asked
    server: LlamaServer = launch(params, checkpoint.file, slot_files.socket_folder if slot_files else None)
    return server


def launch(params: Any, file: Path, socket_folder: Path | None = None) -> Any:
    """The xllamacpp.Server of these xllamacpp.CommonParams.

    Its HTTP listener cannot be disabled. It listens on a socket file in `socket_folder`, or on one that is removed at
    once: then nobody can connect. Raises UserError if llama.cpp cannot load the file.
    """
    import xllamacpp

    with tempfile.TemporaryDirectory(prefix="glm-") as folder:  # mode 0700; deleted with the socket after loading
        params.hostnames = [str(Path(socket_folder or folder) / SOCKET_NAME)]
        try:
            with retain_freed_memory():  # reuse the buffer of one tensor for the next
                return xllamacpp.Server(params)
        except RuntimeError as error:
            problem = f"llama.cpp cannot load {file} ({error})"
            raise UserError(problem, "see the output of llama.cpp on stderr") from error


def common_parameters(file: Path, use_mmap: bool, threads: int) -> Any:
    """The xllamacpp.CommonParams that every server of this product has. Raises UserError as `load_cpu_code`."""
    import xllamacpp

    load_cpu_code()
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.fit_params = False  # do not reduce the context silently
    params.offline = True
    params.warmup = False
    # llama.cpp repacks the weights for its kernels, which is 1.2 times as fast. Mapping the file as well would keep
    # both copies in memory: 7.2 GB instead of 4.1 GB for the 6B in q4_0.
    mode = xllamacpp.llama_load_mode
    params.load_mode = mode.LLAMA_LOAD_MODE_MMAP if use_mmap else mode.LLAMA_LOAD_MODE_NONE
    params.no_extra_bufts = use_mmap
    params.verbosity = LOG_INFO if logger.isEnabledFor(logging.DEBUG) else LOG_ERRORS
    params.ui = params.endpoint_slots = params.endpoint_props = params.endpoint_metrics = False
    params.n_threads_http = 1
    params.api_keys = [secrets.token_urlsafe(32)]  # in case a later version does not support socket files
    return params


def _parameters(checkpoint: GgufCheckpoint, options: EngineOptions) -> Any:
    """The xllamacpp.CommonParams of a server."""
    import xllamacpp

    slot_tokens = aligned_context(checkpoint.context_length)
    params = common_parameters(checkpoint.file, options.use_mmap, options.threads or available_cpus())
    if options.device == "cpu":
        params.n_gpu_layers = 0  # a build with GPU support would use the GPU
    params.n_ctx = options.slots * slot_tokens
    params.n_parallel = options.slots
    params.n_batch = params.n_ubatch = max(BATCH_TOKENS, options.slots * (1 + options.speculative * DRAFT_TOKENS))
    params.ctx_shift = False
    # The prompt cache keeps the KV cache of one slot that switched to another conversation; any slot can take a
    # matching prefix from it. llama.cpp's default of 8 GiB is not part of the memory check.
    params.cache_ram_mib = max(1, checkpoint.model_config.kv_cache_bytes(slot_tokens) >> 20)
    if options.speculative:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
        params.speculative.ngram_simple.size_n, params.speculative.ngram_simple.size_m = LOOKUP_TOKENS, DRAFT_TOKENS
    return params


def read_ahead(file: Path) -> None:
    """Read the file into the page cache: llama.cpp holds the GIL while it loads, and /healthz must answer."""
    block = bytearray(READ_BLOCK_BYTES)
    with file.open("rb", buffering=0) as stream:
        for offset in range(0, file.stat().st_size, READ_BLOCK_BYTES):
            if not _is_cached(stream.fileno(), offset):
                stream.seek(offset)
                stream.readinto(block)


def _is_cached(descriptor: int, offset: int) -> bool:
    """Is the byte at `offset` in the page cache? False if the system does not report it."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except (AttributeError, OSError):
        return False
