"""Arguments and environment of vLLM; those of GPUs are in gpu_settings.py."""

import os
from collections.abc import Mapping
from typing import Any

from entrypoints.checkpoint.adapter_config import CONFIG_FILE
from entrypoints.checkpoint.adapters import Adapter
from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.checkpoint.native import NativeCheckpoint
from entrypoints.checkpoint.tensor_files import read_json
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.vllm.gpu_settings import GPU_ENVIRONMENT, gpu_settings
from entrypoints.errors import UserError
from entrypoints.hardware.cuda_driver import check_driver
from entrypoints.hardware.gpus import check_compute_capability
from entrypoints.hardware.placement import MEMORY_HEADROOM_FACTOR, choose_placement, weight_bytes
from entrypoints.hardware.resources import available_memory
from entrypoints.sizes import format_size

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM accepts for max_lora_rank
# Prompt lookup: drafts of 4 tokens that followed the same 2 to 4 tokens earlier in the conversation
NGRAM_SPECULATION = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_min": 2,
    "prompt_lookup_max": 4,
}
CPU_BLOCK_TOKENS = 128  # tokens in a block of the KV cache
CPU_BATCH_TOKENS = 512  # tokens per step; loading runs one such step too
# Read by vLLM when it is imported and by its processes when they start. Values set by the user take precedence.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1",  # otherwise it queries the network for the address of this machine
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "ERROR",  # it logs a warning for every tensor that it converts
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would copy the locks of this process's threads
}
# Otherwise the first request for log probabilities compiles code for 15 s, and needs a C++ compiler.
CPU_ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1"}


def prepare(device: str) -> str:
    """Set vLLM's environment variables and import it; returns the device type that it was built for, cuda or cpu.

    Raises UserError if vLLM is not installed, finds no device that it was built for, or was not built for `device`.
    """
    os.environ.update(ENVIRONMENT | os.environ)
    if device in ("auto", "cuda"):
        check_driver()
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        raise UserError(
            f"the package vllm cannot be imported ({error})", "install it, or choose another --engine"
        ) from error
    kind = "cuda" if current_platform.is_cuda_alike() else "cpu" if current_platform.is_cpu() else None
    if kind is None:
        raise UserError(
            "vLLM finds no device that it was built for",
            "`glm doctor` lists the devices; or use --engine transformers",
        )
    if device not in ("auto", kind):
        raise UserError(
            f"this vLLM was built for {kind}, not for --device {device}", "use --device auto or another build of vLLM"
        )
    if kind == "cuda":
        check_compute_capability()
    os.environ.update((CPU_ENVIRONMENT if kind == "cpu" else GPU_ENVIRONMENT) | os.environ)
    return kind


def check_adapters(adapters: Mapping[str, Adapter]) -> None:
    """Raise UserError naming adapters that vLLM would not apply whole.

    It does not support a prefix of keys and values, and reads one rank and one alpha for all modules of a LoRA.
    """
    prefixes = [name for name, adapter in adapters.items() if adapter.pre_seq_len is not None]
    if prefixes:
        raise UserError(
            f"vLLM does not support P-Tuning v2 adapters: {', '.join(prefixes)}",
            "use --engine transformers for them, or LoRA adapters",
        )
    for name, adapter in adapters.items():
        ignored = [field for field in ("rank_pattern", "alpha_pattern") if getattr(adapter.lora, field)]
        if ignored:
            raise UserError(
                f"vLLM ignores {' and '.join(ignored)} of the adapter {name}",
                f"use --engine transformers, or merge it: glm export {adapter.folder} OUT --base DIR",
            )


def model_settings(checkpoint: NativeCheckpoint, options: EngineOptions) -> dict[str, Any]:
    """Settings that do not depend on the device."""
    return {
        "model": str(checkpoint.folder.resolve()),
        "generation_config": "vllm",  # each request passes its own settings; the folder's defaults must not apply
        "max_model_len": checkpoint.model_config.context_length,
        "enable_prefix_caching": True,
        "speculative_config": NGRAM_SPECULATION if options.speculative else None,
        "logprobs_mode": "raw_logprobs",
        # no whitespace between JSON tokens: a small model may continue with it until the context is full
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }


def lora_settings(adapters: Mapping[str, Adapter], kind: str) -> dict[str, Any]:
    """Settings that load all adapters at once; raises UserError for a rank that vLLM does not support."""
    if not adapters:
        return {}
    ranks = {name: read_json(adapter.folder / CONFIG_FILE)["r"] for name, adapter in adapters.items()}
    fitting = [rank for rank in MAX_LORA_RANKS if rank >= max(ranks.values())]
    if not fitting:
        found = ", ".join(f"{name} has {rank}" for name, rank in ranks.items())
        raise UserError(
            f"vLLM supports LoRA adapters up to rank {MAX_LORA_RANKS[-1]}: {found}", "use --engine transformers"
        )
    # On CPUs vLLM 0.32 looks up answers without an adapter at index -1. In a batch with an adapter's answers they would
    # get the weights of the last adapter (vllm-project/vllm#48421), so the last entry stays empty.
    max_loras = len(adapters) + (kind == "cpu")
    return {"enable_lora": True, "max_lora_rank": fitting[0], "max_loras": max_loras}


def device_settings(model_config: ModelConfig, kind: str, options: EngineOptions) -> dict[str, Any]:
    """Settings that depend on the device; kind: as `prepare` returns it.

    Raises UserError if the model does not fit, or the device does not support `load_in`.
    """
    if kind == "cpu":
        return _cpu_settings(model_config, options)
    return gpu_settings(model_config, options)


def _cpu_settings(model_config: ModelConfig, options: EngineOptions) -> dict[str, Any]:
    if options.load_in:
        raise UserError("vLLM supports --load-in on GPUs only", "omit --load-in, or use --engine transformers")
    placement = choose_placement(model_config, "cpu", options.dtype)
    return {
        "dtype": placement.dtype,
        "max_num_seqs": options.slots,
        "tensor_parallel_size": options.tensor_parallel_size or 1,
        "data_parallel_size": options.data_parallel_size or 1,
        "enforce_eager": True,  # compilation would take minutes at each start, and needs a C++ compiler
        **_cpu_cache(model_config, options.slots, placement.dtype.itemsize),
    }


def _cpu_cache(model_config: ModelConfig, slots: int, itemsize: int) -> dict[str, Any]:
    """A KV cache of `slots` full contexts and one block that vLLM reserves; its default is nearly all memory.

    Raises UserError if cache and weights do not fit.
    """
    blocks = slots * -(-model_config.context_length // CPU_BLOCK_TOKENS) + 1
    values_per_token = model_config.num_layers * 2 * model_config.num_kv_heads * model_config.head_dim
    cache_bytes = blocks * CPU_BLOCK_TOKENS * values_per_token * itemsize
    needed = cache_bytes + int(weight_bytes(model_config, itemsize) * MEMORY_HEADROOM_FACTOR)
    if (available := available_memory()) < needed:
        raise UserError(
            f"the model with --slots {slots} of {model_config.context_length} tokens needs {format_size(needed)} of "
            f"memory, {format_size(available)} are available",
            "free memory, or use fewer slots or a smaller --context-length",
        )
    return {
        "kv_cache_memory_bytes": cache_bytes,
        "block_size": CPU_BLOCK_TOKENS,
        "max_num_batched_tokens": max(CPU_BATCH_TOKENS, slots),
    }
