"""What continuous batching does to the logits of all running answers, one row each, before it samples."""

from collections.abc import Callable

import torch
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingTemperatureLogitsWarper,
    ContinuousBatchingTopKLogitsWarper,
)
from transformers.generation.continuous_batching.requests import FutureRequestState


def replace_processors(manager: ContinuousBatchingManager, on_invalid: Callable[[str], None] | None) -> None:
    """Make top_k exact, and call `on_invalid` with the id of a request whose logits are NaN or infinite.

    on_invalid: None where the step is a CUDA graph, which can neither wait for the GPU nor has only valid rows.
    """
    for processor in manager.logit_processor.logits_processor:
        if isinstance(processor, ContinuousBatchingTopKLogitsWarper):
            processor.__class__ = _ExactTopK
        elif isinstance(processor, ContinuousBatchingTemperatureLogitsWarper) and on_invalid:
            processor.__class__ = _FiniteTemperature
            processor.on_invalid = on_invalid  # type: ignore[attr-defined]  # of its new class


class _FiniteTemperature(ContinuousBatchingTemperatureLogitsWarper):
    """Comes first. Sampling from NaN would end the loop, and with it all answers."""

    on_invalid: Callable[[str], None]
    request_ids: list[str]

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> torch.Tensor:
        """Called before each step with the requests of its rows."""
        self.request_ids = [request.state.request_id for request in requests_with_new_token]
        return super().prepare_tensor_args(requests_with_new_token)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Logits (B, V), temperatures of the rows in the first B of `tensor_arg`; invalid rows become zeros."""
        is_invalid = (torch.isnan(scores) | torch.isposinf(scores)).any(dim=-1)  # (B,)
        for row in is_invalid.nonzero().flatten().tolist():
            self.on_invalid(self.request_ids[row])
        return super().__call__(scores.masked_fill(is_invalid.unsqueeze(-1), 0), tensor_arg)


class _ExactTopK(ContinuousBatchingTopKLogitsWarper):
    """Keeps one candidate for top_k of 1, also if two tokens have equal logits, which is common in bfloat16."""

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Logits (B, V), top_k of each request in the first B of `tensor_arg`."""
        kept = super().__call__(scores, tensor_arg)  # (B, V)
        is_greedy = (tensor_arg[: scores.size(0)] == 1).unsqueeze(-1)  # (B, 1)
        best = scores.argmax(dim=-1, keepdim=True)  # (B, 1)
        is_other = torch.ones_like(scores, dtype=torch.bool).scatter(1, best, False)  # (B, V)
        return kept.masked_fill(is_greedy & is_other, self.filter_value)
