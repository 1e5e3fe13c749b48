"""Settings of vLLM for NVIDIA GPUs. They have not been run on a GPU; the tests compare them with the locked vLLM.

The image has a C compiler for Triton and no CUDA toolkit, so nothing may run nvcc. FlashInfer does: vLLM would sample
with it on every GPU from compute capability 8.0, and attend with it on B200. Its compiled kernels are on no package
index, and compiling them takes minutes at each start of a container. vLLM's own kernels and Triton's do the same work;
on B200 that is FlashAttention 4, which compiles with the CUTLASS package of the lock.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.engines.options import EngineOptions
from entrypoints.errors import UserError
from entrypoints.hardware.gpus import Gpu, list_gpus
from entrypoints.hardware.placement import MEMORY_HEADROOM_FACTOR, quantized_weight_bytes, weight_bytes
from entrypoints.sizes import format_size

# Read by vLLM's processes when they start. Values set by the user take precedence.
GPU_ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0",
    "VLLM_USE_DEEP_GEMM": "0",  # compiles with nvcc too
}
FLASH_ATTENTION_CAPABILITY = (8, 0)  # of vLLM's FlashAttention; it has no float32
FP8_CAPABILITY = (8, 9)  # multiplies in FP8
ONLINE_QUANTIZATION_CAPABILITY = 7.5  # for FP8 weights that are multiplied in 16 bits
CONTEXT_BYTES = 300_000_000  # of CUDA on each GPU, at least
CONTEXT_STEP = 1024  # of the context length that an error message recommends
# vLLM's 8-bit quantization while loading: a scale for each channel, or, below FP8_CAPABILITY, for each matrix
ONLINE_QUANTIZATION = {True: "fp8_per_channel", False: "fp8_per_tensor"}


def gpu_settings(model_config: ModelConfig, options: EngineOptions) -> dict[str, Any]:
    """Settings for the GPUs that this process may use.

    A copy of the model takes the fewest GPUs that hold it; the others hold further copies, which share the requests.
    Raises UserError: too few or too small GPUs, memory that others use, or no support for `load_in`.
    """
    gpus = list_gpus()
    oldest = min(gpu.capability for gpu in gpus)
    dtype = options.dtype
    if dtype == "auto":
        dtype = "bfloat16" if all(gpu.has_bf16 for gpu in gpus) else "float16"
    quantization = _quantization(options.load_in, dtype, oldest)
    tensor_parallel, data_parallel = _parallel_sizes(model_config, options, gpus, dtype)
    _check_free_memory(gpus[: tensor_parallel * data_parallel], options.gpu_memory_utilization)
    has_flash_attention = oldest >= FLASH_ATTENTION_CAPABILITY and dtype != "float32"
    return {
        "dtype": dtype,
        "max_num_seqs": -(-options.slots // data_parallel),  # of each copy
        "tensor_parallel_size": tensor_parallel,
        "data_parallel_size": data_parallel,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "attention_config": {"backend": "FLASH_ATTN" if has_flash_attention else "TRITON_ATTN"},
        "enable_flashinfer_autotune": False,
        "enforce_eager": options.enforce_eager,
        **quantization,
    }


def _quantization(load_in: str | None, dtype: str, oldest: tuple[int, int]) -> dict[str, str]:
    if not load_in:
        return {}
    if dtype == "float32" or oldest < divmod(int(10 * ONLINE_QUANTIZATION_CAPABILITY), 10):
        raise UserError(
            "--load-in 8bit in vLLM needs --dtype bfloat16 or float16 and a GPU of compute capability "
            f"{ONLINE_QUANTIZATION_CAPABILITY} or higher",
            "use --engine transformers, or omit --load-in",
        )
    return {"quantization": ONLINE_QUANTIZATION[oldest >= FP8_CAPABILITY]}


@dataclass(frozen=True)
class _CopyMemory:
    """Memory of one copy of the model in bytes; vLLM refuses to start without room for one full context."""

    weights: int
    cache_per_token: int
    num_kv_heads: int
    context_length: int

    @classmethod
    def of(cls, model_config: ModelConfig, load_in: str | None, itemsize: int) -> "_CopyMemory":
        if load_in:
            weights = quantized_weight_bytes(model_config, load_in, itemsize)
        else:
            weights = weight_bytes(model_config, itemsize)
        cache = model_config.kv_cache_bytes(1) // 2 * itemsize
        return cls(weights, cache, model_config.num_kv_heads, model_config.context_length)

    def on_each(self, gpus: int) -> int:
        """Bytes of each of so many GPUs."""
        return self._weights_on_each(gpus) + self.context_length * self._token_on_each(gpus)

    def fitting_context(self, gpus: int, memory: int) -> int:
        """Tokens of the longest context, in steps, that so many GPUs with so much memory hold; 0: not one step."""
        tokens = max(0, memory - self._weights_on_each(gpus)) // self._token_on_each(gpus)
        return tokens // CONTEXT_STEP * CONTEXT_STEP

    def _weights_on_each(self, gpus: int) -> int:
        return int(self.weights * MEMORY_HEADROOM_FACTOR) // gpus

    def _token_on_each(self, gpus: int) -> int:
        return self.cache_per_token // min(gpus, self.num_kv_heads)  # each GPU has at least one of the heads


def _parallel_sizes(model_config: ModelConfig, options: EngineOptions, gpus: list[Gpu], dtype: str) -> tuple[int, int]:
    """GPUs of each copy of the model, and copies; raises UserError: too few or too small GPUs.

    vLLM gives the first GPUs to the first copy, and so on: the copies end before the first GPU that is too small.
    """
    copy = _CopyMemory.of(model_config, options.load_in, 4 if dtype == "float32" else 2)
    usable = [int(gpu.total * options.gpu_memory_utilization) for gpu in gpus]
    tensor_parallel = options.tensor_parallel_size or _tensor_parallel_size(model_config.num_heads, copy, usable)
    if model_config.num_heads % tensor_parallel:
        raise UserError(
            f"--tensor-parallel-size {tensor_parallel} does not divide the {model_config.num_heads} attention heads",
            "use 1, 2, 4 or 8",
        )
    groups = [usable[first : first + tensor_parallel] for first in range(0, len(gpus), tensor_parallel)]
    holds = (len(group) == tensor_parallel and min(group) >= copy.on_each(tensor_parallel) for group in groups)
    data_parallel = options.data_parallel_size or max(1, sum(itertools.takewhile(bool, holds)))
    if (needed := tensor_parallel * data_parallel) > len(gpus):
        raise UserError(
            f"--tensor-parallel-size {tensor_parallel} times --data-parallel-size {data_parallel} is {needed} GPUs, "
            f"{len(gpus)} are visible",
            "use smaller numbers, or make more GPUs visible (NUM_GPUS, CUDA_VISIBLE_DEVICES)",
        )
    _check_size(copy, tensor_parallel, min(usable[:needed]))
    return tensor_parallel, data_parallel


def _tensor_parallel_size(heads: int, copy: _CopyMemory, usable: list[int]) -> int:
    """The fewest of the first GPUs that hold a copy and divide the attention heads; the most if none do."""
    divisors = [count for count in range(1, len(usable) + 1) if heads % count == 0]
    return next((count for count in divisors if copy.on_each(count) <= min(usable[:count])), divisors[-1])


def _check_size(copy: _CopyMemory, gpus: int, smallest: int) -> None:
    if (needed := copy.on_each(gpus)) <= smallest:
        return
    context = copy.fitting_context(gpus, smallest)
    shorter = f"--context-length {context}, " if context else ""
    raise UserError(
        f"with --tensor-parallel-size {gpus} vLLM needs {format_size(needed)} on each GPU for the model and a context "
        f"of {copy.context_length} tokens, and may use {format_size(smallest)} of the smallest",
        f"use {shorter}--load-in 8bit, --engine transformers, or larger or more GPUs (1, 2, 4 or 8 for a copy)",
    )


def _check_free_memory(gpus: list[Gpu], fraction: float) -> None:
    """Raise UserError where less is free than the share that vLLM reserves; it would end with a traceback.

    vLLM compares when it has opened its context on the GPU, which takes some of the free memory.
    """
    for number, gpu in enumerate(gpus):
        free = max(0, gpu.free - CONTEXT_BYTES)
        if free < gpu.total * fraction:
            raise UserError(
                f"vLLM would reserve {fraction:.0%} of the {format_size(gpu.total)} of GPU {number} ({gpu.name}), "
                f"{format_size(free)} are free beside its context",
                f"end the processes that use it (nvidia-smi), or --gpu-memory-utilization "
                f"{math.floor(100 * free / gpu.total) / 100:.2f}",
            )
