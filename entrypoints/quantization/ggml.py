"""Quantize rows with llama.cpp's own function `ggml_quantize_chunk`, called in the library that xllamacpp installs.

`llama-quantize` calls the same function, so the file holds the same bytes, and no further program has to be built.
"""

import ctypes
import functools
from collections.abc import Callable

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from entrypoints.errors import UserError


def quantize(values: np.ndarray, ggml_type: GgmlType, importance: np.ndarray | None = None) -> np.ndarray:
    """Convert float32 `(rows, columns)` to `ggml_type`; returns uint8 `(rows, bytes of a row)`.

    importance: weight of the squared error of each column, float32 `(columns,)`. Thread-safe; ctypes releases the GIL.
    Raises UserError: llama.cpp wrote another number of bytes than gguf expects.
    """
    rows, columns = values.shape
    values = np.ascontiguousarray(values, np.float32)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    if weights is not None and weights.shape != (columns,):
        raise AssertionError(f"importance has shape {weights.shape}, expected ({columns},)")
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    blocks = np.empty((rows, columns // block_values * block_bytes), np.uint8)
    pointer = None if weights is None else weights.ctypes.data
    first_value = 0
    written = _quantize_chunk()(ggml_type, values.ctypes.data, blocks.ctypes.data, first_value, rows, columns, pointer)
    if written != blocks.nbytes:
        raise UserError(
            f"llama.cpp wrote {written} bytes of {ggml_type.name}, expected {blocks.nbytes}", "upgrade xllamacpp"
        )
    return blocks


@functools.cache
def _quantize_chunk() -> Callable[..., int]:
    from xllamacpp import xllamacpp  # here and not above: callers check the CPU before llama.cpp is loaded

    function = ctypes.CDLL(xllamacpp.__file__).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    first_value_rows_columns = [ctypes.c_int64] * 3
    function.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *first_value_rows_columns,
        ctypes.c_void_p,
    ]
    return function
