"""What continuous batching does to the logits of all running answers, one row each, before it samples."""

from collections.abc import Callable

import torch
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingTemperatureLogitsWarper,
    ContinuousBatchingTopKLogitsWarper,
)

Check = Callable[[torch.Tensor], None]


def replace_processors(manager: ContinuousBatchingManager, check: Check | None) -> None:
    """Make top_k exact, and call `check` with the logits (B, V) of each step.

    check: None where the step is a CUDA graph, which cannot wait for the GPU and has arbitrary rows for padding.
    """
    for processor in manager.logit_processor.logits_processor:
        if isinstance(processor, ContinuousBatchingTopKLogitsWarper):
            processor.__class__ = _ExactTopK
        elif isinstance(processor, ContinuousBatchingTemperatureLogitsWarper) and check:
            processor.__class__ = _CheckedTemperature
            processor.check = check  # type: ignore[attr-defined]  # of its new class


class _CheckedTemperature(ContinuousBatchingTemperatureLogitsWarper):
    """Comes first, and checks the logits as the model computed them."""

    check: Check

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Logits (B, V), temperatures of the rows in the first B of `tensor_arg`."""
        self.check(scores)
        return super().__call__(scores, tensor_arg)


class _ExactTopK(ContinuousBatchingTopKLogitsWarper):
    """Keeps one candidate for top_k of 1, also if two tokens have equal logits, which is common in bfloat16."""

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Logits (B, V), top_k of each request in the first B of `tensor_arg`."""
        kept = super().__call__(scores, tensor_arg)  # (B, V)
        is_greedy = (tensor_arg[: scores.size(0)] == 1).unsqueeze(-1)  # (B, 1)
        best = scores.argmax(dim=-1, keepdim=True)  # (B, 1)
        is_other = torch.ones_like(scores, dtype=torch.bool).scatter(1, best, False)  # (B, V)
        return kept.masked_fill(is_greedy & is_other, self.filter_value)
