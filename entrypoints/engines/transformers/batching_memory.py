"""Memory that continuous batching needs on a GPU, counted before the weights are loaded.

transformers counts it when its loop starts; if it does not fit, the loop dies after the weights were loaded. Without
FlashAttention, its attention copies the keys and values of all slots for each head, one layer at a time.
Source: PagedAttentionMemoryHandler of transformers 5.19 and 5.24, with which the tests compare the bytes.
"""

from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.errors import UserError
from entrypoints.sizes import format_size

PAGE_TOKENS = 256
GPU_BATCH_TOKENS = 2048  # of a step: a longer one would delay the other answers, and enlarge the mask
# The share of the free memory that transformers uses when it samples; the rest is for temporary tensors
MEMORY_SHARE = 0.8
CUDA_CONTEXT_BYTES = 10**9
INDEX_BYTES, ROW_BYTES = 4, 8  # int32 and int64


def page_count(context_length: int, slots: int) -> int:
    """Pages of the KV cache for `slots` full contexts, and one to share."""
    return slots * -(-context_length // PAGE_TOKENS) + 1


def batching_bytes(model_config: ModelConfig, slots: int, itemsize: int = 2, flash_attention: bool = False) -> int:
    """Bytes beside the weights for `slots` full contexts; itemsize: bytes of a number in the KV cache."""
    heads, kv_heads, head_dim = model_config.num_heads, model_config.num_kv_heads, model_config.head_dim
    copied_heads = 2 * kv_heads if flash_attention else 2 * heads + kv_heads
    page_bytes = PAGE_TOKENS * model_config.num_layers * 2 * kv_heads * head_dim * itemsize
    pages = page_count(model_config.context_length, slots)
    cached_tokens = pages * PAGE_TOKENS
    per_cached_token = copied_heads * head_dim * itemsize + ROW_BYTES
    widths = model_config.hidden_size + (heads + 2 * kv_heads + copied_heads) * head_dim
    per_batch_token = widths * itemsize + 8 * INDEX_BYTES + 2 * ROW_BYTES
    logits = slots * (model_config.hidden_size * itemsize + model_config.vocab_size * 4)
    mask = 0 if flash_attention else itemsize * GPU_BATCH_TOKENS * (cached_tokens + GPU_BATCH_TOKENS)
    cache = (pages + 2) * page_bytes + cached_tokens * per_cached_token
    return cache + GPU_BATCH_TOKENS * per_batch_token + logits + mask


def fitting_slots(model_config: ModelConfig, free: float, itemsize: int = 2, flash_attention: bool = False) -> int:
    """How many full contexts fit into `free` bytes beside the weights."""
    slots = 0
    while batching_bytes(model_config, slots + 1, itemsize, flash_attention) <= free * MEMORY_SHARE:
        slots += 1
    return slots


def require_slots(model_config: ModelConfig, slots: int, free: int, itemsize: int, flash_attention: bool) -> None:
    """Raise UserError if the slots do not fit into `free` bytes beside the weights; names the number that fits."""
    needed = batching_bytes(model_config, slots, itemsize, flash_attention) / MEMORY_SHARE
    if needed <= free:
        return
    fitting = fitting_slots(model_config, free, itemsize, flash_attention)
    raise UserError(
        f"--slots {slots} of {model_config.context_length} tokens need {format_size(int(needed))} of GPU memory beside "
        f"the weights, {format_size(max(0, free))} are free",
        f"use --slots {max(1, fitting)}, a smaller --context-length, --engine vllm, which shares its cache, or "
        "--load-in 8bit",
    )
