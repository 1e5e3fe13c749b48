"""Compares a LoRA that this package merges with the same LoRA applied by PEFT, before anything is written.

Only one layer is in float32 at a time, so a model that does not fit into the memory can be merged.
"""

import logging

import torch

from entrypoints.chat_format.prompt import Message
from entrypoints.checkpoint.adapters import Adapter
from entrypoints.checkpoint.native import NativeCheckpoint
from entrypoints.errors import UserError
from entrypoints.quantization.layerwise_forward import LayerwiseModel

logger = logging.getLogger(__name__)
PROMPTS = ("你好", "你是谁", "类型#裙*颜色#蓝色*风格#简约")
# Maximum difference of the logits, as a fraction of the largest one. In float32 only sums in another order differ;
# 16-bit weights are rounded once more after merging.
MAX_DIFFERENCE = {torch.float32: 5e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def require_equal_merge(
    checkpoint: NativeCheckpoint, adapter: Adapter, stored_dtype: torch.dtype
) -> list[torch.Tensor]:
    """Raise UserError unless the merged weights give the logits of the base model with the LoRA applied by PEFT.

    stored_dtype: that of the merged weights on disk; they are also compared before they are rounded to it. Returns the
    logits of the rounded weights, (T, V) for each of PROMPTS.
    """
    prompts = encode_prompts(checkpoint, adapter)
    expected = _logits(LayerwiseModel(checkpoint, by_peft=adapter), prompts)
    logits: list[torch.Tensor] = []
    for dtype in dict.fromkeys((torch.float32, stored_dtype)):
        logits = _logits(LayerwiseModel(checkpoint, merged=adapter, stored_dtype=dtype), prompts)
        difference = relative_difference(logits, expected)
        logger.info("logits of the LoRA merged in %s differ from PEFT's by %.1e of the largest", dtype, difference)
        if not difference <= MAX_DIFFERENCE[dtype]:  # also true for nan
            remedy = "serve the base model and the LoRA unmerged: --adapter"
            if dtype != torch.float32:
                remedy = f"merge it in float32 (glm export --dtype float32), or {remedy}"
            raise UserError(
                f"merging {adapter.folder} in {str(dtype).removeprefix('torch.')} changes the logits by "
                f"{difference:.1e} of the largest logit",
                remedy,
            )
    return logits


def require_equal_logits(
    written: NativeCheckpoint, checkpoint: NativeCheckpoint, adapter: Adapter, expected: list[torch.Tensor]
) -> None:
    """Raise UserError unless the written model gives the logits that `require_equal_merge` returned."""
    logits = _logits(LayerwiseModel(written), encode_prompts(checkpoint, adapter))
    difference = relative_difference(logits, expected)
    if not difference <= MAX_DIFFERENCE[torch.float32]:
        raise UserError(
            f"the logits of the written model differ from those of its weights by {difference:.1e} of the largest",
            "check the disk, and export again",
        )


def encode_prompts(checkpoint: NativeCheckpoint, adapter: Adapter) -> list[list[int]]:
    """The token ids of PROMPTS in the format of the adapter."""
    return [adapter.prompt_format.encode([Message("user", text)], checkpoint.tokenizer) for text in PROMPTS]


def relative_difference(logits: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference as a fraction of the largest expected logit."""
    found, other = torch.cat(logits), torch.cat(expected)  # (sum of T, V)
    return ((found - other).abs().max() / other.abs().max()).item()


def _logits(model: LayerwiseModel, prompts: list[list[int]]) -> list[torch.Tensor]:
    return model.logits(model.hidden_states(prompts))
