"""The precision in which a run computes, from the flags and what the hardware supports."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from entrypoints.errors import UserError
from entrypoints.hardware.cuda_driver import check_driver
from entrypoints.hardware.gpus import check_compute_capability, list_gpus
from entrypoints.training.arguments import TrainArguments


@dataclass(frozen=True)
class Precision:
    """fp16, bf16 and use_cpu, as the Trainer takes them; trainable parameters are in float32 in any case."""

    fp16: bool
    bf16: bool
    use_cpu: bool

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the forward pass."""
        if self.bf16:
            return torch.bfloat16
        return torch.float16 if self.fp16 else torch.float32


def resolve_precision(arguments: TrainArguments) -> Precision:
    """Decide for this machine; raises UserError for a device or precision that it does not have."""
    if arguments.device in ("auto", "cuda"):
        check_driver()
        check_compute_capability()
    cuda = torch.cuda.is_available() and arguments.device in ("auto", "cuda")
    use_cpu = not cuda and (arguments.device == "cpu" or not torch.backends.mps.is_available())
    if not cuda:
        _check_flags_without_cuda(arguments, use_cpu)
    _set_deepspeed_environment(cuda)
    if arguments.bf16 is not None:
        return Precision(arguments.fp16, arguments.bf16, use_cpu)
    has_bf16 = cuda and all(gpu.has_bf16 for gpu in list_gpus())
    return Precision(arguments.fp16, has_bf16 and not arguments.fp16, use_cpu)


def _check_flags_without_cuda(arguments: TrainArguments, use_cpu: bool) -> None:
    if arguments.device == "cuda":
        raise UserError("--device cuda: this machine has no CUDA device", "use --device auto")
    if arguments.fp16:
        raise UserError("--fp16 needs a CUDA device", "omit it, or use --bf16")
    if arguments.quantized_bits and not use_cpu:
        raise UserError(
            f"bitsandbytes does not support a base model in {arguments.quantized_bits} bits on mps",
            "use --device cpu, or omit --quantization-bit and use --method lora in place of qlora",
        )


def _set_deepspeed_environment(cuda: bool) -> None:
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which accelerate imports, warns otherwise
    if shutil.which("ninja") is None:  # DeepSpeed compiles its ops with the ninja of this interpreter's folder
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
