"""How much an error in each column of a matrix matters: the mean square of what the user's own rows multiply it with.

llama.cpp calls this an importance matrix. Its quantiser then keeps exact what those rows use most.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from entrypoints.checkpoint.adapters import Adapter
from entrypoints.checkpoint.native import NativeCheckpoint
from entrypoints.engines.layerwise import Layerwise
from entrypoints.engines.placement import cpu_computes_bf16


def importance(
    checkpoint: NativeCheckpoint, rows: Sequence[Sequence[int]], adapter: Adapter | None = None
) -> dict[str, np.ndarray]:
    """Native name of each matrix but the embedding -> float32 weight of each of its columns, from rows of ids."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = defaultdict(int)

    def watch(name: str, given: torch.Tensor) -> None:
        square = given.square().sum(dim=0)
        sums[name] = sums[name] + square if name in sums else square
        counts[name] += given.shape[0]

    dtype = torch.bfloat16 if cpu_computes_bf16() else torch.float32
    Layerwise(checkpoint, adapter, dtype=dtype).hidden(rows, watch)
    return {name: (total / counts[name]).numpy() for name, total in sums.items()}
