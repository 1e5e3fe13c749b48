"""Device placement and precision of a model: one policy for every command.

cuda: bfloat16, float16 on cards without it (V100, T4). mps: float16. cpu: bfloat16 if the CPU computes in it, otherwise
float32. Several GPUs: whole layers in order; embedding, final norm and output layer on the first GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from entrypoints.checkpoint.layout import NF4_BLOCK_SIZE, ModelConfig, TensorMapping, tensor_mappings
from entrypoints.errors import UserError
from entrypoints.hardware.cuda_driver import check_driver
from entrypoints.hardware.gpus import check_compute_capability, list_gpus
from entrypoints.hardware.resources import available_cpus, available_memory, cpu_flags
from entrypoints.settings import LOAD_IN_BITS
from entrypoints.sizes import format_size

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
# bytes per parameter of the largest matrix, while the CPU quantizes several matrices to 8 or 4 bits
QUANTIZATION_BYTES_PER_PARAMETER = 12
MEMORY_HEADROOM_FACTOR = 1.1  # weights, and the cache of a short conversation
NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"}  # flags of x86 and Arm in /proc/cpuinfo


@dataclass(frozen=True)
class Placement:
    """Device and precision; `device_map` maps module names to devices, as transformers takes it."""

    device_map: dict[str, str]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{', '.join(dict.fromkeys(self.device_map.values()))} in {str(self.dtype).removeprefix('torch.')}"


def choose_placement(
    model_config: ModelConfig,
    device: str = "auto",
    dtype: str = "auto",
    load_in: str | None = None,
    already_quantized: bool = False,
) -> Placement:
    """Decide for this machine. Raises UserError, before any loading: the device is missing, or memory is too small.

    load_in: a key of settings.LOAD_IN_BITS. already_quantized: the files are stored in these bits.
    """
    kind = _device_type(device)
    if load_in and kind == "mps":
        raise UserError(
            f"bitsandbytes does not support {LOAD_IN_BITS[load_in]} bits on mps",
            "use a GGUF file: glm quantize DIR OUT.gguf; or --device cpu",
        )
    chosen = _choose_dtype(kind, dtype)
    weights = (
        quantized_weight_bytes(model_config, load_in, chosen.itemsize)
        if load_in
        else weight_bytes(model_config, chosen.itemsize)
    )
    needed = int(weights * MEMORY_HEADROOM_FACTOR)
    if kind == "cuda":
        free = [gpu.free for gpu in list_gpus()]
        return Placement(layer_device_map(model_config, required_gpu_count(needed, free)), chosen)
    if kind == "cpu" and load_in and not already_quantized:
        needed = max(needed, weights + quantization_workspace_bytes(model_config))
    if kind == "cpu" and (available := available_memory()) < needed:
        raise UserError(
            f"the model needs {format_size(needed)} of memory in {chosen}, {format_size(available)} are available",
            "free memory, or use --dtype bfloat16 or a quantized model",
        )
    return Placement({"": kind}, chosen)


def weight_bytes(model_config: ModelConfig, itemsize: int) -> int:
    """Bytes of all weights at `itemsize` bytes per parameter."""
    return sum(map(_parameter_count, tensor_mappings(model_config))) * itemsize


def quantized_weight_bytes(model_config: ModelConfig, load_in: str, itemsize: int) -> int:
    """Bytes of all weights with the matrices of the layers in 8 or 4 bits; embedding and output layer unquantized."""
    quantized = sum(
        _parameter_count(mapping)
        for mapping in tensor_mappings(model_config)
        if mapping.columns and ".layers." in mapping.native[0]
    )
    bits = LOAD_IN_BITS[load_in]
    scales = quantized // NF4_BLOCK_SIZE * 4 if bits == 4 else 0  # 8 bits have one per row, which is negligible
    return weight_bytes(model_config, itemsize) - quantized * itemsize + quantized * bits // 8 + scales


def quantization_workspace_bytes(model_config: ModelConfig) -> int:
    """Bytes that the CPU needs beside the result to quantize the matrices of the layers."""
    return QUANTIZATION_BYTES_PER_PARAMETER * max(
        _parameter_count(mapping) for mapping in tensor_mappings(model_config) if ".layers." in mapping.native[0]
    )


def bitsandbytes_config(bits: int, compute: torch.dtype, double: bool = False) -> "BitsAndBytesConfig":
    """Configuration for transformers to load 8 or 4 bits. double: quantize the scales of 4 bits too."""
    from transformers import BitsAndBytesConfig  # takes seconds, which listing the devices does not need

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]  # its __init__ has no annotations
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute,
    )


def required_gpu_count(needed: int, free: Sequence[int]) -> int:
    """How many of the first GPUs together hold `needed` bytes. Raises UserError: all of them are too small."""
    for count in range(1, len(free) + 1):
        if min(free[:count]) * count >= needed:
            return count
    sizes = ", ".join(map(format_size, free))
    raise UserError(
        f"the model needs {format_size(needed)}, the GPUs have {sizes} free",
        "free GPU memory, use more GPUs or a quantized model",
    )


def layer_device_map(model_config: ModelConfig, count: int, kind: str = "cuda") -> dict[str, str]:
    """Map every module of GlmForCausalLM to one of `count` devices; layers stay whole and in order.

    The first device counts the embedding and the output layer as two layers of its share.
    """
    names = [f"{kind}:{number}" for number in range(count)]
    per_device = (model_config.num_layers + 2) / count
    ends = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), names[0])
    layers = {
        f"model.layers.{n}": names[min(int((n + 2) / per_device), count - 1)] for n in range(model_config.num_layers)
    }
    return {**ends, **layers}


def list_devices() -> list[tuple[str, str]]:
    """(name, description) of the CPU, then of every GPU, or why there is none."""
    bf16 = "yes" if cpu_has_native_bf16() else "no"
    found = [("cpu", f"bfloat16 in hardware: {bf16}")]
    for number, gpu in enumerate(list_gpus()):
        found.append((f"gpu {number}", f"{gpu.name}, {format_size(gpu.free)} of {format_size(gpu.total)} free"))
    if torch.backends.mps.is_available():
        found.append(("gpu", "mps"))
    elif not torch.cuda.is_available():
        cuda_build = "" if torch.version.cuda is None else ", although this torch is a CUDA build: check the driver"
        found.append(("gpu", f"none{cuda_build}"))
    return found


def limit_torch_threads() -> None:
    """Limit torch's threads to the available CPUs: torch does not see the quota of a cgroup."""
    torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))


def cpu_has_native_bf16() -> bool:
    """Does the CPU multiply bfloat16 in hardware? Otherwise torch emulates it, slower than float32."""
    return bool(NATIVE_BF16 & cpu_flags())


def _parameter_count(mapping: TensorMapping) -> int:
    return torch.Size(mapping.shape).numel()


def _device_type(device: str) -> str:
    if device in ("auto", "cuda"):
        check_driver()
        check_compute_capability()
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(kind for kind, is_available in available.items() if is_available)
    if not available[device]:
        raise UserError(f"this machine has no {device} device", "use --device auto; `glm doctor` lists the devices")
    return device


def _choose_dtype(kind: str, dtype: str) -> torch.dtype:
    if dtype != "auto":
        named: torch.dtype = getattr(torch, dtype)
        return named
    if kind == "cuda":
        return torch.bfloat16 if all(gpu.has_bf16 for gpu in list_gpus()) else torch.float16
    if kind == "mps":
        return torch.float16
    return torch.bfloat16 if cpu_has_native_bf16() else torch.float32
