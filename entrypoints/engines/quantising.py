"""From a converted checkpoint to a checked GGUF file: LoRA merged, columns weighed, written, compared, then named."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entrypoints.checkpoint import ggml
from entrypoints.checkpoint.adapters import Adapter, open_adapter
from entrypoints.checkpoint.gguf_writing import Extras, refuse_adapter_alone, refuse_target, write_gguf
from entrypoints.checkpoint.manifest import refuse_other_base
from entrypoints.checkpoint.native import NativeCheckpoint, open_native
from entrypoints.dataset.reading import Example
from entrypoints.engines.gguf_check import Comparison, compare, require_merged, require_near
from entrypoints.engines.importance import importance
from entrypoints.engines.machine import available_cpus, require_processor
from entrypoints.errors import UserError

logger = logging.getLogger(__name__)
WEIGHED = ("q4_0", "q4_k_m", "q5_k_m")  # types that an importance matrix changes
ROW_TOKENS = 512  # of each side of a row


@dataclass(frozen=True)
class Order:
    """What `glm quantize` was asked for."""

    folder: Path
    target: Path
    type: str
    adapter: Path | None = None
    rows: Sequence[Example] = ()  # for the importance matrix
    rows_from: str = ""


def quantise(order: Order) -> tuple[int, Comparison]:
    """Write and check the file; returns its size in bytes and how near it is.

    Raises UserError for what cannot be made, and when the file is not its source; then nothing is left.
    """
    _refuse(order)
    checkpoint, adapter = open_native(order.folder), None
    if order.adapter:
        adapter = open_adapter(order.adapter, checkpoint.shape)
        refuse_other_base(order.adapter, order.folder)
        require_merged(checkpoint, adapter)
    weights = _weights(order, checkpoint, adapter) if order.rows else {}
    found: list[Comparison] = []

    def check(file: Path) -> None:
        found.append(compare(file, checkpoint, adapter))
        require_near(found[0], order.type)

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


def _weights(order: Order, checkpoint: NativeCheckpoint, adapter: Adapter | None) -> dict[str, np.ndarray]:
    logger.info("weighing the columns by %d rows of %s", len(order.rows), order.rows_from)
    prompt_format = adapter.prompt_format if adapter else checkpoint.prompt_format
    rows = [
        prompt_format.encode_for_training(row.messages(), checkpoint.tokenizer, ROW_TOKENS, ROW_TOKENS).ids
        for row in order.rows
    ]
    return importance(checkpoint, rows, adapter)
