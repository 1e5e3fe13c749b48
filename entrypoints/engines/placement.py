"""Where a model goes and in which precision: one policy for every command.

cuda: bfloat16, float16 on cards without it (V100, T4). mps: float16. cpu: bfloat16 where the processor computes in it,
else float32. Several GPUs: whole layers in order, and the embedding, final norm and output layer together on the first.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from entrypoints.checkpoint.layout import BLOCK, Shape, tensors
from entrypoints.engines.driver import check_driver
from entrypoints.engines.machine import available_cpus, available_memory, processor_flags
from entrypoints.errors import UserError
from entrypoints.settings import LOADS

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

logger = logging.getLogger(__name__)
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTISING = 12  # bytes for each number of the largest matrix, while a processor makes 8 or 4 bits of several
HEADROOM = 1.1  # weights and what a short conversation needs beside them
NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"}  # flags of x86 and Arm in /proc/cpuinfo


@dataclass(frozen=True)
class Placement:
    """A decision: `device_map` maps module names to devices, as transformers takes it."""

    device_map: dict[str, str]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{', '.join(dict.fromkeys(self.device_map.values()))} in {str(self.dtype).removeprefix('torch.')}"


def place(
    shape: Shape, device: str = "auto", dtype: str = "auto", load_in: str | None = None, stored: bool = False
) -> Placement:
    """Decide for this machine; raises UserError, before any loading, when device or memory are not there.

    stored: its files are in as few bits as `load_in` says, so nothing is made smaller on the way.
    """
    kind = _kind(device)
    if load_in and kind == "mps":
        raise UserError(
            f"bitsandbytes does not compute in {LOADS[load_in]} bits on mps",
            "use a GGUF file: glm quantize DIR OUT.gguf; or --device cpu",
        )
    chosen = _dtype(kind, dtype)
    weights = loaded_bytes(shape, load_in, chosen.itemsize) if load_in else weight_bytes(shape, chosen.itemsize)
    needed = int(weights * HEADROOM)
    if kind == "cuda":
        free = [torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())]
        return Placement(spread(shape, gpus_needed(needed, free)), chosen)
    if kind == "cpu" and load_in and not stored:
        needed = max(needed, weights + quantising_bytes(shape))
    if kind == "cpu" and (available := available_memory()) < needed:
        raise UserError(
            f"the model needs {needed / 1e9:.1f} GB of memory in {chosen}, {available / 1e9:.1f} GB are available",
            "free memory, or use --dtype bfloat16 or a quantised model",
        )
    return Placement({"": kind}, chosen)


def weight_bytes(shape: Shape, itemsize: int) -> int:
    """Bytes of all weights at `itemsize` bytes a number."""
    return sum(torch.Size(entry.shape).numel() for entry in tensors(shape)) * itemsize


def loaded_bytes(shape: Shape, load_in: str, itemsize: int) -> int:
    """The same with the matrices inside the layers in 8 or 4 bits; embedding and output layer stay as they are."""
    layers = [entry for entry in tensors(shape) if entry.columns and ".layers." in entry.native[0]]
    small = sum(torch.Size(entry.shape).numel() for entry in layers)
    scales = small // BLOCK * 4 if LOADS[load_in] == 4 else 0  # in 8 bits each row has one, which is nothing
    return weight_bytes(shape, itemsize) - small * itemsize + small * LOADS[load_in] // 8 + scales


def quantising_bytes(shape: Shape) -> int:
    """Bytes that a processor needs beside the result, to make the matrices of the layers smaller."""
    return QUANTISING * max(
        torch.Size(entry.shape).numel() for entry in tensors(shape) if ".layers." in entry.native[0]
    )


def in_fewer_bits(bits: int, compute: torch.dtype, double: bool = False) -> "BitsAndBytesConfig":
    """How transformers is told to load 8 or 4 bits; `double`: the scales of 4 bits are quantised too."""
    from transformers import BitsAndBytesConfig  # seconds that a look at the devices need not wait

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute,
    )


def gpus_needed(needed: int, free: Sequence[int]) -> int:
    """How many of the first GPUs hold `needed` bytes; raises UserError when all together do not."""
    for count in range(1, len(free) + 1):
        if min(free[:count]) * count >= needed:
            return count
    sizes = ", ".join(f"{size / 1e9:.1f}" for size in free)
    raise UserError(
        f"the model needs {needed / 1e9:.1f} GB, the GPUs have {sizes} GB free",
        "free GPU memory, use more GPUs or a quantised model",
    )


def spread(shape: Shape, count: int, kind: str = "cuda") -> dict[str, str]:
    """A device map over `count` devices with every module of GlmForCausalLM in it; layers stay whole and in order.

    The first device counts the embedding and the output layer as two layers of its share.
    """
    names = [f"{kind}:{number}" for number in range(count)]
    per_device = (shape.layers + 2) / count
    ends = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), names[0])
    layers = {f"model.layers.{n}": names[min(int((n + 2) / per_device), count - 1)] for n in range(shape.layers)}
    return {**ends, **layers}


def _kind(device: str) -> str:
    if device in ("auto", "cuda"):
        check_driver()
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(kind for kind, there in present.items() if there)
    if not present[device]:
        raise UserError(f"this machine has no {device} device", "use --device auto; `glm doctor` shows what there is")
    return device


def _dtype(kind: str, dtype: str) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if kind == "mps":
        return torch.float16
    return torch.bfloat16 if cpu_computes_bf16() else torch.float32


def devices() -> list[tuple[str, str]]:
    """What this machine computes on, each with a description: the processor, then every GPU or why there is none."""
    bf16 = "yes" if cpu_computes_bf16() else "no"
    found = [("processor", f"bfloat16 in hardware: {bf16}")]
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        found.append((f"gpu {number}", f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"))
    if torch.backends.mps.is_available():
        found.append(("gpu", "mps"))
    elif not torch.cuda.is_available():
        cuda_build = "" if torch.version.cuda is None else ", though this torch is a CUDA build: check the driver"
        found.append(("gpu", f"none{cuda_build}"))
    return found


def share_processors() -> None:
    """Let torch compute with as many threads as this process may use: it does not see a control group's quota."""
    torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))


def cpu_computes_bf16() -> bool:
    """Does the processor multiply bfloat16 itself? Elsewhere torch emulates it, slower than float32."""
    return bool(NATIVE_BF16 & processor_flags())
