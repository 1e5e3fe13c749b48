"""Attention of a training run: causal without a mask, and over packed rows by their lengths.

Rows of a batch are padded on the right. A token attends to earlier ones only, so that no label sees padding. With a
mask, torch could not use its flash kernels, and packed rows would need one of all tokens by all tokens.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from entrypoints.hardware.gpus import FIRST_BF16_CAPABILITY

# transformers makes no mask for an implementation that it does not know
TRAINING_ATTENTION = "glm_training"
# FlashAttention-2, which torch contains, needs the same cards as bfloat16
FIRST_FLASH_CAPABILITY = FIRST_BF16_CAPABILITY


def register() -> str:
    """Make the attention known to transformers; returns its name."""
    AttentionInterface.register(TRAINING_ATTENTION, attend)
    return TRAINING_ATTENTION


def attend(  # noqa: PLR0913 - the signature of transformers
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row_lengths: Sequence[int] | None = None,
    row_starts: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention output (B, T, heads, D) of query (B, heads, T, D) to keys and values (B, kv_heads, T, D).

    attention_mask: ignored, see above. row_lengths: of packed rows, which are a batch of one, and row_starts (R + 1,)
    their starts in int32, with the end of the last one. kwargs: `scaling` is used.
    """
    scale: float = kwargs["scaling"]
    if row_lengths is None:
        return _causal(query, key, value, scale).transpose(1, 2), None
    if has_flash_kernel(query):
        assert row_starts is not None, "packing gives both"
        return _variable_length(query, key, value, (scale, max(row_lengths), row_starts)), None
    parts = (torch.split(states, list(row_lengths), dim=2) for states in (query, key, value))
    rows = [_causal(q, k, v, scale).transpose(1, 2) for q, k, v in zip(*parts, strict=True)]  # (1, L, heads, D) each
    return torch.cat(rows, dim=1), None


def has_flash_kernel(states: torch.Tensor) -> bool:
    """Whether torch has a flash kernel of CUDA for these query, key or value states."""
    if states.device.type != "cuda":
        return False
    half = _compute_dtype(states) in (torch.float16, torch.bfloat16)
    return half and torch.cuda.get_device_capability(states.device) >= FIRST_FLASH_CAPABILITY


def _variable_length(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: tuple[float, int, torch.Tensor]
) -> torch.Tensor:
    """Output (1, T, heads, D) of one kernel for all rows; rows: scale, longest row, starts of the rows."""
    scale, longest, starts = rows
    dtype = _compute_dtype(query)  # autocast does not know varlen_attn
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))  # (T, heads, D)
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}  # causal
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # older versions of torch have no such flag
        options["enable_gqa"] = True
    output: Any = varlen_attn(query, key, value, starts, starts, longest, longest, **options)
    attended: torch.Tensor = output.unsqueeze(0)
    return attended


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Output (B, heads, T, D). A single query is the newest token of a generated answer: it attends to all keys.

    Without a flash kernel, keys and values are repeated: torch's memory-efficient kernel, which older cards and float32
    use, has no grouped heads, and the one that remains holds the scores of every head, T by T.
    """
    grouped = query.device.type == "cpu" or has_flash_kernel(query)
    if not grouped:
        repeats = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=query.shape[2] > 1, scale=scale, enable_gqa=grouped
    )


def _compute_dtype(states: torch.Tensor) -> torch.dtype:
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
