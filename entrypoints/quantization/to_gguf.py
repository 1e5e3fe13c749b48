"""From a converted checkpoint to a validated GGUF file: merge a LoRA, measure importance, write, compare, publish."""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from entrypoints.checkpoint.adapters import Adapter, open_adapter
from entrypoints.checkpoint.atomic_files import require_disk_space
from entrypoints.checkpoint.gguf_reader import IMATRIX_TYPES
from entrypoints.checkpoint.manifest import check_base_weights
from entrypoints.checkpoint.native import NativeCheckpoint, open_native
from entrypoints.dataset.reader import Example
from entrypoints.engines.llamacpp.cpu_features import load_cpu_code
from entrypoints.errors import UserError
from entrypoints.hardware.placement import limit_torch_threads
from entrypoints.hardware.resources import available_cpus, available_memory
from entrypoints.quantization.divergence import (
    DivergenceResult,
    measure_file,
    require_small_divergence,
)
from entrypoints.quantization.gguf_vocabulary import read_vocabulary
from entrypoints.quantization.gguf_writer import (
    GgufOptions,
    check_target,
    file_bytes,
    require_full_model,
    write_gguf,
)
from entrypoints.quantization.imatrix import importance_matrix
from entrypoints.quantization.layerwise_forward import FLOAT32_BYTES, require_layer_memory
from entrypoints.quantization.merge_check import require_equal_merge
from entrypoints.sizes import format_size

logger = logging.getLogger(__name__)
MAX_ROW_TOKENS = 512  # of the prompt and of the answer of a row
MLP_WORK_TENSORS = 5  # tensors as wide as the MLP: gate, up, their product, the observed copy, and its squares


@dataclass(frozen=True)
class QuantizeOptions:
    """Arguments of `glm quantize` for a GGUF file."""

    folder: Path
    target: Path
    type: str
    adapter: Path | None = None  # a LoRA to merge
    rows: Sequence[Example] = ()  # to measure the importance matrix on
    rows_source: str = ""  # name of their file


def quantize(
    options: QuantizeOptions, on_validated: Callable[[Path], object] | None = None
) -> tuple[int, DivergenceResult]:
    """Write and validate the file; returns its size in bytes and its divergence from the source.

    on_validated: called with the validated temporary file before it is renamed to its target.
    Raises UserError for options or a model that cannot be quantized and for a divergence above the limit; no file is
    left then.
    """
    _check_options(options)
    limit_torch_threads()
    checkpoint, adapter = open_native(options.folder), None
    if options.adapter:
        adapter = open_adapter(options.adapter, checkpoint.model_config)
        check_base_weights(options.adapter, options.folder)
    read_vocabulary(checkpoint)  # writing needs it; what is missing shows now
    require_disk_space(options.target.parent, file_bytes(checkpoint.model_config, options.type))
    free = available_memory() - require_layer_memory(checkpoint, f"quantizing {checkpoint.folder}", adapter)
    rows = _encode_rows(options.rows, checkpoint, adapter)
    _require_imatrix_memory(rows, checkpoint, free)
    if adapter:
        require_equal_merge(checkpoint, adapter, torch.float32)
    importance = {}
    if rows:
        logger.info("measuring the importance matrix on %d rows of %s", len(rows), options.rows_source)
        importance = importance_matrix(checkpoint, rows, adapter)
    results: list[DivergenceResult] = []

    def validate(file: Path) -> None:
        results.append(measure_file(file, checkpoint, adapter))
        require_small_divergence(results[0], options.type)
        if on_validated:
            on_validated(file)

    gguf_options = GgufOptions(adapter, importance, options.rows_source, available_cpus())
    size = write_gguf(options.folder, options.target, options.type, gguf_options, validate)
    return size, results[0]


def _check_options(options: QuantizeOptions) -> None:
    load_cpu_code()
    if options.rows and options.type not in IMATRIX_TYPES:
        raise UserError(
            f"--imatrix has no effect on --type {options.type}", f"use it with {', '.join(IMATRIX_TYPES)}, or omit it"
        )
    check_target(options.target)
    require_full_model(options.folder)


def _encode_rows(rows: Sequence[Example], checkpoint: NativeCheckpoint, adapter: Adapter | None) -> list[list[int]]:
    prompt_format = adapter.prompt_format if adapter else checkpoint.prompt_format
    return [
        prompt_format.encode_for_training(row.messages(), checkpoint.tokenizer, MAX_ROW_TOKENS, MAX_ROW_TOKENS).ids
        for row in rows
    ]


def _require_imatrix_memory(rows: list[list[int]], checkpoint: NativeCheckpoint, free: int) -> None:
    """Raise UserError unless `free` bytes hold the hidden states of all rows and the MLP's work on one row."""
    if not rows:
        return
    model_config = checkpoint.model_config
    work = max(map(len, rows)) * MLP_WORK_TENSORS * model_config.intermediate_size * FLOAT32_BYTES
    states = (len(row) * model_config.hidden_size * FLOAT32_BYTES for row in rows)
    needed = list(itertools.accumulate(states, initial=work))[1:]  # for the first 1, 2, … rows
    if needed[-1] > free:
        fitting = sum(size <= free for size in needed)
        raise UserError(
            f"the importance matrix of {len(rows)} rows needs {format_size(needed[-1], 2)} of memory, "
            f"{format_size(free, 2)} are left",
            f"use --imatrix-rows {fitting}" if fitting else "free memory, or omit --imatrix: not even one row fits",
        )
