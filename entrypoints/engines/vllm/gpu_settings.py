"""Settings of vLLM for NVIDIA GPUs. They have not been run on a GPU; the tests compare them with the locked vLLM.

The image has a C compiler for Triton and no CUDA toolkit, so nothing may run nvcc. FlashInfer does: vLLM would sample
with it on every GPU from compute capability 8.0, and attend with it on B200. Its compiled kernels are on no package
index, and compiling them takes minutes at each start of a container. vLLM's own kernels and Triton's do the same work.
"""

from typing import Any

from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.engines.options import EngineOptions
from entrypoints.errors import UserError
from entrypoints.hardware.gpus import Gpu, list_gpus
from entrypoints.hardware.placement import (
    MEMORY_HEADROOM_FACTOR,
    quantized_weight_bytes,
    required_gpu_count,
    weight_bytes,
)
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


def _parallel_sizes(model_config: ModelConfig, options: EngineOptions, gpus: list[Gpu], dtype: str) -> tuple[int, int]:
    """GPUs of each copy of the model, and copies; raises UserError if there are not so many GPUs."""
    if options.load_in:
        weights = quantized_weight_bytes(model_config, options.load_in, 2)
    else:
        weights = weight_bytes(model_config, 4 if dtype == "float32" else 2)
    usable = [int(gpu.total * options.gpu_memory_utilization) for gpu in gpus]
    tensor_parallel = options.tensor_parallel_size or _tensor_parallel_size(
        model_config, required_gpu_count(int(weights * MEMORY_HEADROOM_FACTOR), usable), len(usable)
    )
    if model_config.num_heads % tensor_parallel:
        raise UserError(
            f"--tensor-parallel-size {tensor_parallel} does not divide the {model_config.num_heads} attention heads",
            "use 1, 2, 4 or 8",
        )
    data_parallel = options.data_parallel_size or max(1, len(gpus) // tensor_parallel)
    if (needed := tensor_parallel * data_parallel) > len(gpus):
        raise UserError(
            f"--tensor-parallel-size {tensor_parallel} times --data-parallel-size {data_parallel} is {needed} GPUs, "
            f"{len(gpus)} are visible",
            "use smaller numbers, or make more GPUs visible (NUM_GPUS, CUDA_VISIBLE_DEVICES)",
        )
    return tensor_parallel, data_parallel


def _tensor_parallel_size(model_config: ModelConfig, minimum: int, available: int) -> int:
    """The smallest number of GPUs, at least `minimum`, that divides the number of attention heads."""
    heads = model_config.num_heads
    counts = [count for count in range(minimum, available + 1) if heads % count == 0]
    if not counts:
        raise UserError(
            f"the model needs {minimum} GPUs, and {heads} heads cannot be split over {minimum} to {available}",
            "make more GPUs visible (CUDA_VISIBLE_DEVICES), or use --engine transformers",
        )
    return counts[0]


def _check_free_memory(gpus: list[Gpu], fraction: float) -> None:
    """Raise UserError where less is free than the share that vLLM reserves; it would end with a traceback."""
    for number, gpu in enumerate(gpus):
        if gpu.free < gpu.total * fraction:
            raise UserError(
                f"vLLM would reserve {fraction:.0%} of the {format_size(gpu.total)} of GPU {number} ({gpu.name}), "
                f"{format_size(gpu.free)} are free",
                f"end the processes that use it (nvidia-smi), or --gpu-memory-utilization "
                f"{max(0.0, gpu.free / gpu.total - 0.01):.2f}",
            )
