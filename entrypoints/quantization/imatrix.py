"""The importance matrix of llama.cpp, measured on the user's own rows.

The importance of a column of a weight matrix is the mean square of the input that it is multiplied with. The quantizer
weights the squared error of each column by it.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from entrypoints.checkpoint.adapters import Adapter
from entrypoints.checkpoint.native import NativeCheckpoint
from entrypoints.hardware.placement import cpu_has_native_bf16
from entrypoints.quantization.layerwise_forward import LayerwiseModel


def importance_matrix(
    checkpoint: NativeCheckpoint, rows: Sequence[Sequence[int]], adapter: Adapter | None = None
) -> dict[str, np.ndarray]:
    """Native name of each weight matrix except the embedding -> importance of its columns, float32 (columns,).

    rows: token ids. adapter: a LoRA, merged first.
    """
    sums: dict[str, torch.Tensor] = {}  # (columns,) each
    counts: dict[str, int] = defaultdict(int)

    def observe(name: str, inputs: torch.Tensor) -> None:  # (T, columns)
        squares = inputs.square().sum(dim=0)
        sums[name] = sums[name] + squares if name in sums else squares
        counts[name] += inputs.shape[0]

    dtype = torch.bfloat16 if cpu_has_native_bf16() else torch.float32
    LayerwiseModel(checkpoint, merged=adapter, dtype=dtype).hidden_states(rows, observe)
    return {name: (total / counts[name]).numpy() for name, total in sums.items()}
