"""GlmForCausalLM with a P-Tuning v2 prefix: learned keys and values in front of every layer's cache.

PEFT's prefix tuning is no help: it drops the caller's position ids, so the first token stands at position
`pre_seq_len`. The reference starts at 0, and its prefix keys are not rotated, so the difference shows in every logit.
"""

import torch
from transformers import DynamicCache, GlmForCausalLM


class PrefixedGlm(GlmForCausalLM):
    """Set `prefix` to (layers * 2, groups, length, head_dim) after loading; everything else is as without one."""

    prefix: torch.Tensor

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, **kwargs):
        """As GlmForCausalLM; attention_mask and position_ids (from 0) speak of the real tokens only."""
        batch, length = input_ids.shape
        prefix_length = self.prefix.shape[2]
        cache = DynamicCache(config=self.config) if cache is None else cache
        seen = max(0, cache.get_seq_length() - prefix_length)
        if cache.get_seq_length() == 0:
            self._fill(cache, batch)
        if attention_mask is None:
            attention_mask = input_ids.new_ones(batch, seen + length)
        if position_ids is None:
            position_ids = torch.arange(seen, seen + length, device=input_ids.device).unsqueeze(0)
        attention_mask = torch.cat([attention_mask.new_ones(batch, prefix_length), attention_mask], dim=1)
        return super().forward(input_ids, attention_mask, position_ids, cache, **kwargs)

    def _fill(self, cache: DynamicCache, batch: int) -> None:
        for number, layer in enumerate(self.model.layers):
            weight = layer.self_attn.k_proj.weight  # a model spread over devices needs each layer's prefix at its place
            keys, values = (
                self.prefix[2 * number : 2 * number + 2].to(weight).unsqueeze(1).expand(-1, batch, -1, -1, -1)
            )
            cache.update(keys, values, number)
