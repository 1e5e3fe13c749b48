"""What the installed vLLM decides for a GPU that it only believes in: python pretended_gpu.py MODEL CAPABILITY.

The CPU build of vLLM has the same Python code as the CUDA build. Here its platform is CUDA's with a pretended card, and
the extensions that only the CUDA build has, and FlashInfer, are empty. Prints JSON.
"""

import dataclasses
import importlib.machinery
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

from entrypoints.checkpoint.native import open_native
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.vllm import engine_args, gpu_settings
from entrypoints.hardware.gpus import Gpu

CUDA_EXTENSIONS = (
    "vllm._C_stable_libtorch",
    "vllm.vllm_flash_attn",
    "vllm.vllm_flash_attn.flash_attn_interface",
    *(
        "flashinfer",
        "flashinfer.decode",
        "flashinfer.prefill",
        "flashinfer.utils",
        "flashinfer.jit",
        "flashinfer.jit.core",
    ),
    *("flashinfer.compilation_context", "flashinfer.sampling"),
)
GIB = 1 << 30


class Extension(types.ModuleType):
    """It has every class and function; the functions answer True."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {}) if name[0].isupper() else lambda *args, **kwargs: True


def pretend(capability: tuple[int, int], memory: int) -> None:
    """Make this card vLLM's current platform."""
    import torch
    from vllm import _custom_ops, platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention import selector

    class Pretended(CudaPlatformBase):
        get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(*capability))
        get_device_name = classmethod(lambda cls, device_id=0: "Pretended")
        get_device_total_memory = classmethod(lambda cls, device_id=0: memory)
        device_count = classmethod(lambda cls: 1)
        num_compute_units = classmethod(lambda cls, device_id=0: 100)
        log_warnings = classmethod(lambda cls: None)

    platforms._current_platform = Pretended()
    selector._cached_get_attn_backend.cache_clear()
    for name in dir(_custom_ops):
        if name.startswith("cutlass_") and "supports" in name:
            setattr(_custom_ops, name, lambda number: number >= 89)
    torch.accelerator.current_device_index = lambda: 0
    gpu_settings.list_gpus = lambda: [Gpu("Pretended", memory, memory, capability)]


def decisions(folder: Path, options: EngineOptions, own_settings: bool) -> dict[str, Any]:
    """What vLLM runs on the pretended card, with the settings of this product or with its own defaults."""
    from vllm import AsyncEngineArgs
    from vllm.config import set_current_vllm_config
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.attention.selector import get_attn_backend
    from vllm.v1.sample.ops.topk_topp_sampler import flashinfer_sampler_supported

    checkpoint = open_native(folder)
    settings = engine_args.model_settings(checkpoint, options)
    settings |= engine_args.device_settings(checkpoint.model_config, "cuda", options)
    if not own_settings:
        settings = {name: settings[name] for name in ("model", "max_model_len", "dtype")}
    config = AsyncEngineArgs(**settings).create_engine_config(UsageContext.OPENAI_API_SERVER)
    with set_current_vllm_config(config):
        attention = get_attn_backend(128, config.model_config.dtype, None).get_name()
        sampler = "FlashInfer" if flashinfer_sampler_supported() else "vLLM"
        linear = _linear_kernel(settings["quantization"]) if options.load_in else None
    return {
        "attention": attention,
        "sampler": sampler,
        "batch_tokens": config.scheduler_config.max_num_batched_tokens,
        "sequences": config.scheduler_config.max_num_seqs,
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "cuda_graphs": config.compilation_config.cudagraph_mode.name,
        "cuda_graphs_with_lora": config.compilation_config.cudagraph_specialize_lora,
        "fused_all_reduce": config.compilation_config.pass_config.fuse_allreduce_rms,
        "flashinfer_autotune": config.kernel_config.enable_flashinfer_autotune,
        "linear": linear,
    }


def _linear_kernel(quantization: str) -> str:
    """Name of the kernel that multiplies with the weights of --load-in 8bit."""
    import torch
    from vllm.model_executor.kernels.linear import init_fp8_linear_kernel
    from vllm.model_executor.layers.quantization.online import fp8

    per_channel = quantization == "fp8_per_channel"
    method = fp8.Fp8PtpcOnlineLinearMethod if per_channel else fp8.Fp8PerTensorOnlineLinearMethod
    weight_key = fp8.kFp8StaticChannelSym if per_channel else fp8.kFp8StaticTensorSym
    kernel = init_fp8_linear_kernel(
        activation_quant_key=method.activation_quant_key,
        weight_quant_key=weight_key,
        weight_shape=(4096, 4096),
        input_dtype=torch.float16,
        out_dtype=torch.float16,
    )
    return type(kernel).__name__


def main(folder: Path, capability: tuple[int, int]) -> None:
    """Print the decisions: by vLLM's defaults, with our settings, eager and in 8 bits."""
    os.environ.update(engine_args.ENVIRONMENT)
    sys.modules.update({name: Extension(name) for name in CUDA_EXTENSIONS})
    pretend(capability, 80 * GIB if capability >= (9, 0) else 24 * GIB)
    options = EngineOptions(slots=64)
    found = {"defaults": decisions(folder, options, own_settings=False)}
    os.environ.update(gpu_settings.GPU_ENVIRONMENT)
    for name, changed in (("ours", {}), ("eager", {"enforce_eager": True}), ("8bit", {"load_in": "8bit"})):
        found[name] = decisions(folder, dataclasses.replace(options, **changed), own_settings=True)
    print(json.dumps(found))


if __name__ == "__main__":
    major, minor = map(int, sys.argv[2].split("."))
    main(Path(sys.argv[1]), (major, minor))
