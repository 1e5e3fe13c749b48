"""From a converted checkpoint to a checked GGUF file: LoRA merged, columns weighed, written, compared, then named."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entrypoints.checkpoint import ggml
from entrypoints.checkpoint.adapters import Adapter, open_adapter
from entrypoints.checkpoint.gguf import WEIGHED
from entrypoints.checkpoint.gguf_writing import Extras, refuse_adapter_alone, refuse_target, write_gguf
from entrypoints.checkpoint.layout import tensors
from entrypoints.checkpoint.manifest import refuse_other_base
from entrypoints.checkpoint.native import NativeCheckpoint, open_native
from entrypoints.dataset.reading import Example
from entrypoints.engines.gguf_check import Comparison, compare, require_merged, require_near
from entrypoints.engines.importance import importance
from entrypoints.engines.llamacpp_build import require_processor
from entrypoints.engines.machine import available_cpus, available_memory
from entrypoints.errors import UserError

logger = logging.getLogger(__name__)
ROW_TOKENS = 512  # of each side of a row
WORK = 200_000_000  # bytes for the rows that are being made smaller, and for llama.cpp to answer in


@dataclass(frozen=True)
class Order:
    """What `glm quantize` was asked for."""

    folder: Path
    target: Path
    type: str
    adapter: Path | None = None
    rows: Sequence[Example] = ()  # for the importance matrix
    rows_from: str = ""


def quantise(order: Order, finished: Callable[[Path], object] | None = None) -> tuple[int, Comparison]:
    """Write and check the file; returns its size in bytes and how near it is.

    finished: called with the checked file before it gets its name.
    Raises UserError for what cannot be made, and when the file is not its source; then nothing is left.
    """
    _refuse(order)
    checkpoint, adapter = open_native(order.folder), None
    _require_memory(checkpoint)
    if order.adapter:
        adapter = open_adapter(order.adapter, checkpoint.shape)
        refuse_other_base(order.adapter, order.folder)
        require_merged(checkpoint, adapter)
    weights = _weights(order, checkpoint, adapter) if order.rows else {}
    found: list[Comparison] = []

    def check(file: Path) -> None:
        found.append(compare(file, checkpoint, adapter))
        require_near(found[0], order.type)
        if finished:
            finished(file)

    extras = Extras(adapter, weights, order.rows_from, available_cpus())
    size = write_gguf(order.folder, order.target, order.type, extras, check)
    return size, found[0]


def _refuse(order: Order) -> None:
    require_processor()
    if order.rows and order.type not in WEIGHED:
        raise UserError(f"--imatrix changes nothing with --type {order.type}", f"it is for {', '.join(WEIGHED)}")
    if order.rows and (missing := ggml.quantiser_missing()):
        raise UserError(f"--imatrix needs llama.cpp's quantiser: {missing}", "leave it out")
    refuse_target(order.target)
    refuse_adapter_alone(order.folder)


def _require_memory(checkpoint: NativeCheckpoint) -> None:
    """Not that of the model: one finished tensor in half precision and, for the check, one layer in float32."""
    sizes = {entry.native[0]: math.prod(entry.shape) for entry in tensors(checkpoint.shape)}
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    needed = 4 * layer + 2 * max(sizes.values()) + WORK
    if (free := available_memory()) < needed:
        raise UserError(
            f"quantising {checkpoint.folder} needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are available",
            "free memory, or raise the container's limit",
        )


def _weights(order: Order, checkpoint: NativeCheckpoint, adapter: Adapter | None) -> dict[str, np.ndarray]:
    logger.info("weighing the columns by %d rows of %s", len(order.rows), order.rows_from)
    prompt_format = adapter.prompt_format if adapter else checkpoint.prompt_format
    rows = [
        prompt_format.encode_for_training(row.messages(), checkpoint.tokenizer, ROW_TOKENS, ROW_TOKENS).ids
        for row in order.rows
    ]
    return importance(checkpoint, rows, adapter)
