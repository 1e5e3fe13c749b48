"""llama.cpp's own quantiser: `ggml_quantize_chunk`, called inside the library that xllamacpp brings.

It is what `llama-quantize` uses, importance matrix included, so k-quants need no further program and nothing is built.
A library that hides the function leaves the types that gguf's numpy code writes: f16, q8_0 and q4_0, bit for bit the
same.
"""

import ctypes
import functools
import importlib.util
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from entrypoints.errors import UserError

FUNCTION = "ggml_quantize_chunk"
PLAIN_KINDS = frozenset({Kind.F32, Kind.F16})  # no quantiser is needed
NUMPY_KINDS = PLAIN_KINDS | {Kind.Q8_0, Kind.Q4_0}


def quantiser_missing() -> str | None:
    """Why llama.cpp's quantiser cannot be called; None where it can."""
    if _package() is None:
        return "the package xllamacpp is not installed"
    return None if _function() else f"this build of xllamacpp does not show {FUNCTION}"


def quantize(numbers: np.ndarray, kind: Kind, importance: np.ndarray | None = None) -> np.ndarray:
    """Rows of float32 as blocks of `kind`; `importance`: the weight of an error in each column, float32.

    Safe in several threads, which then run at the same time.
    """
    function = None if kind in PLAIN_KINDS else _function()
    if function is None:
        return gguf.quantize(numbers, kind)
    rows, columns = numbers.shape
    per_block, bytes_ = gguf.GGML_QUANT_SIZES[kind]
    numbers, blocks = np.ascontiguousarray(numbers, np.float32), np.empty((rows, columns // per_block * bytes_), "u1")
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    if weights is not None and weights.shape != (columns,):
        raise AssertionError(f"importance of {weights.shape} for {columns} columns")
    written = function(
        kind,
        numbers.ctypes.data,
        blocks.ctypes.data,
        0,
        rows,
        columns,
        None if weights is None else weights.ctypes.data,
    )
    if written != blocks.nbytes:
        raise UserError(f"llama.cpp wrote {written} bytes of {kind.name}, not {blocks.nbytes}", "renew xllamacpp")
    return blocks


@functools.cache
def _function() -> "ctypes._NamedFuncPointer | None":
    file = _package()
    function = getattr(ctypes.CDLL(str(file)), FUNCTION, None) if file else None
    if function:
        function.restype = ctypes.c_size_t
        integers = [ctypes.c_int64] * 3  # first number, rows, columns
        function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *integers, ctypes.c_void_p]
    return function


def _package() -> Path | None:
    folder = importlib.util.find_spec("xllamacpp")
    if folder is None or folder.origin is None:
        return None
    return next(iter(sorted(Path(folder.origin).parent.glob("xllamacpp*.so"))), None)
