"""What vLLM is told when it starts. What is said here of GPUs has never run on one."""

import os
from collections.abc import Mapping

from entrypoints.checkpoint.adapters import CONFIG_FILE, Adapter
from entrypoints.checkpoint.layout import Shape
from entrypoints.checkpoint.native import NativeCheckpoint
from entrypoints.checkpoint.original import read_json
from entrypoints.engines.driver import check_driver
from entrypoints.engines.machine import available_memory
from entrypoints.engines.placement import HEADROOM, gpus_needed, loaded_bytes, place, weight_bytes
from entrypoints.errors import UserError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM makes room for LoRA of one of these ranks
EIGHT_BITS = "fp8_per_channel"  # vLLM's own way to 8 bits, made while it loads
CPU_PAGE = 128  # tokens in a block of its cache
CPU_BATCH_TOKENS = 512  # read in one step; loading runs one such step, too
# Read by vLLM when it is imported and by its processes when they start; what the user has set already stays.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1",  # otherwise it asks the network for this machine's address
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "ERROR",  # it warns of every tensor that it converts
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would copy the locks of this process's threads
}
# The first request for log probabilities would compile for 15 s, with a C++ compiler that an image need not have.
CPU_ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1"}


def prepare(device: str) -> str:
    """Set vLLM's environment and import it; returns the kind of device that it was built for, cuda or cpu.

    Raises UserError when vLLM is not installed, finds no device that it was built for, or it is not `device`.
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
            "`glm doctor` shows what there is; or use --engine transformers",
        )
    if device not in ("auto", kind):
        raise UserError(
            f"this vLLM was built for {kind}, not for --device {device}", "use --device auto or another build of vLLM"
        )
    if kind == "cpu":
        os.environ.update(CPU_ENVIRONMENT | os.environ)
    return kind


def refuse_prefixes(adapters: Mapping[str, Adapter]) -> None:
    """Raise UserError naming the P-Tuning v2 adapters: vLLM has no place for a prefix of keys and values."""
    prefixes = [name for name, adapter in adapters.items() if adapter.pre_seq_len is not None]
    if prefixes:
        raise UserError(
            f"vLLM cannot run P-Tuning v2 adapters: {', '.join(prefixes)}",
            "use --engine transformers for them, or LoRA adapters",
        )


def model_settings(checkpoint: NativeCheckpoint, slots: int) -> dict:
    """What is the same on every device."""
    return {
        "model": str(checkpoint.folder.resolve()),
        "generation_config": "vllm",  # every request says what it wants; nothing is inherited unseen
        "max_model_len": checkpoint.shape.window,
        "max_num_seqs": slots,
        "logprobs_mode": "raw_logprobs",
        # no blanks between JSON's parts: a small model goes on with them until the window is full
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }


def lora_settings(adapters: Mapping[str, Adapter], kind: str) -> dict:
    """Room for these adapters, all at once; raises UserError for a rank that vLLM does not take."""
    if not adapters:
        return {}
    ranks = {name: read_json(adapter.folder / CONFIG_FILE)["r"] for name, adapter in adapters.items()}
    fitting = [rank for rank in RANKS if rank >= max(ranks.values())]
    if not fitting:
        found = ", ".join(f"{name} has {rank}" for name, rank in ranks.items())
        raise UserError(f"vLLM takes LoRA adapters up to rank {RANKS[-1]}: {found}", "use --engine transformers")
    # On processors vLLM 0.32 looks up answers without an adapter at index -1, and so gives them the last one's weights
    # when an answer with an adapter runs beside them (vllm-project/vllm#48421): the last place stays empty.
    places = len(adapters) + (kind == "cpu")
    return {"enable_lora": True, "max_lora_rank": fitting[0], "max_loras": places}


def device_settings(
    shape: Shape, slots: int, kind: str, dtype: str, count: int | None, share: float, load_in: str | None = None
) -> dict:
    """kind: as `prepare` returns it. count: processes, each with a GPU of its own, to split every layer over; None for
    as few as do. share: of each GPU's memory, for weights and cache together. load_in: 8bit, or None for 16 bits.
    """
    if kind == "cpu":
        if load_in:
            raise UserError("vLLM makes 8 bits on GPUs alone", "leave out --load-in, or use --engine transformers")
        placement = place(shape, kind, dtype)
        # not compiled: that would cost minutes at each start, and a C++ compiler
        same = {"dtype": placement.dtype, "tensor_parallel_size": count or 1, "enforce_eager": True}
        return same | _cpu_cache(shape, slots, placement.dtype.itemsize)
    from vllm.platforms import current_platform as gpus

    if dtype == "auto":  # as in placement.py, but asked of the driver: torch would open every GPU in this process
        dtype = "bfloat16" if gpus.has_device_capability(80) else "float16"
    usable = [int(gpus.get_device_total_memory(number) * share) for number in range(gpus.device_count())]
    size = loaded_bytes(shape, load_in, 2) if load_in else weight_bytes(shape, 4 if dtype == "float32" else 2)
    count = count or _even_share(shape, gpus_needed(int(size * HEADROOM), usable), len(usable))
    settings = {"dtype": dtype, "tensor_parallel_size": count, "gpu_memory_utilization": share}
    return settings | _eight_bits(dtype, gpus.has_device_capability(75)) if load_in else settings


def _eight_bits(dtype: str, new_enough: bool) -> dict:
    if dtype == "float32" or not new_enough:
        raise UserError(
            "vLLM's 8 bits need --dtype bfloat16 or float16 and a GPU of compute capability 7.5 or more",
            "use --engine transformers, or leave out --load-in",
        )
    return {"quantization": EIGHT_BITS}


def _even_share(shape: Shape, least: int, most: int) -> int:
    """The fewest GPUs, at least `least`, that the attention heads can be dealt out to evenly."""
    counts = [count for count in range(least, most + 1) if shape.heads % count == 0]
    if not counts:
        raise UserError(
            f"the model needs {least} GPUs, and {shape.heads} heads cannot be split over {least} to {most}",
            "show it more GPUs (CUDA_VISIBLE_DEVICES), or use --engine transformers",
        )
    return counts[0]


def _cpu_cache(shape: Shape, slots: int, itemsize: int) -> dict:
    """Room for `slots` full windows, and a page that vLLM keeps; its own choice is nearly all memory of the machine."""
    pages = slots * -(-shape.window // CPU_PAGE) + 1
    needed = pages * CPU_PAGE * shape.layers * 2 * shape.groups * shape.head_dim * itemsize
    weights = int(weight_bytes(shape, itemsize) * HEADROOM)
    if (available := available_memory()) < needed + weights:
        raise UserError(
            f"the model with {slots} slots of {shape.window} tokens needs {(needed + weights) / 1e9:.1f} GB of memory, "
            f"{available / 1e9:.1f} GB are available",
            "free memory, or use fewer slots",
        )
    return {
        "kv_cache_memory_bytes": needed,
        "block_size": CPU_PAGE,
        "max_num_batched_tokens": max(CPU_BATCH_TOKENS, slots),
    }
