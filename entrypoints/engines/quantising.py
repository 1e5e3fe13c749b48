"""From a converted checkpoint to a checked GGUF file: LoRA merged, columns weighed, written, compared, then named."""

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from entrypoints.engines.placement import share_processors
from entrypoints.errors import UserError

logger = logging.getLogger(__name__)
ROW_TOKENS = 512  # of each side of a row
FLOAT = 4  # bytes of a number in float32
MLP_COPIES = 5  # times the MLP's width: gate, up, both multiplied, the copy that is watched, and its squares
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
    share_processors()
    checkpoint, adapter = open_native(order.folder), None
    free = available_memory() - _require_memory(checkpoint)
    if order.adapter:
        adapter = open_adapter(order.adapter, checkpoint.shape)
        refuse_other_base(order.adapter, order.folder)
    rows = _encoded(order.rows, checkpoint, adapter)
    _require_room(rows, checkpoint, free)
    if adapter:
        require_merged(checkpoint, adapter)
    weights = {}
    if rows:
        logger.info("weighing the columns by %d rows of %s", len(rows), order.rows_from)
        weights = importance(checkpoint, rows, adapter)
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


def _require_memory(checkpoint: NativeCheckpoint) -> int:
    """Not that of the model: one finished tensor in half precision and, for the check, one layer in float32."""
    sizes = {entry.native[0]: math.prod(entry.shape) for entry in tensors(checkpoint.shape)}
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    needed = 4 * layer + 2 * max(sizes.values()) + WORK
    if (free := available_memory()) < needed:
        raise UserError(
            f"quantising {checkpoint.folder} needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are available",
            "free memory, or raise the container's limit",
        )
    return needed


def _encoded(rows: Sequence[Example], checkpoint: NativeCheckpoint, adapter: Adapter | None) -> list[list[int]]:
    prompt_format = adapter.prompt_format if adapter else checkpoint.prompt_format
    return [
        prompt_format.encode_for_training(row.messages(), checkpoint.tokenizer, ROW_TOKENS, ROW_TOKENS).ids
        for row in rows
    ]


def _require_room(rows: list[list[int]], checkpoint: NativeCheckpoint, free: int) -> None:
    """Beside all else there must be room for what every row is at a layer, and one row's work in its MLP."""
    if not rows:
        return
    work = max(map(len, rows)) * MLP_COPIES * checkpoint.shape.ffn * FLOAT
    needs = list(itertools.accumulate((len(row) * checkpoint.shape.hidden * FLOAT for row in rows), initial=work))[1:]
    if needs[-1] > free:
        fits = sum(need <= free for need in needs)
        raise UserError(
            f"weighing by {len(rows)} rows needs {needs[-1] / 1e9:.2f} GB of memory more than the {free / 1e9:.2f} GB"
            " that are left",
            f"use --imatrix-rows {fits}" if fits else "--imatrix-rows 1 is too much: free memory, or leave it out",
        )
