"""GlmForCausalLM with a P-Tuning v2 prefix: trained keys and values in front of the KV cache of every layer.

PEFT's prefix tuning cannot replace it: it ignores the given position ids, so that the first token gets position
`pre_seq_len`. The reference implementation starts at position 0 and does not rotate the keys of the prefix; the
difference is visible in every logit.
"""

import functools
import inspect
import types
from typing import Any

import torch
from transformers import Cache, DynamicCache, GlmForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

# Name of the argument of `forward` for the KV cache: `past_key_values` in the transformers 5.19 that vLLM needs
CACHE = "cache" if "cache" in inspect.signature(GlmForCausalLM.forward).parameters else "past_key_values"


class PrefixedGlm(GlmForCausalLM):  # type: ignore[no-untyped-call]  # transformers: untyped
    """Set `prefix` (2 * layers, kv_heads, P, head_dim) after loading; P is the prefix length."""

    prefix: torch.Tensor

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As GlmForCausalLM, for input_ids (B, T); attention_mask and position_ids do not include the prefix."""
        batch, length = input_ids.shape
        prefix_length = self.prefix.shape[2]
        cache = kwargs.pop(CACHE, None)
        cache = DynamicCache(config=self.config) if cache is None else cache
        past = max(0, cache.get_seq_length() - prefix_length)  # tokens of the prompt and answer in the cache
        if cache.get_seq_length() == 0:
            self._prefill_prefix(cache, batch)
        if attention_mask is None:
            attention_mask = input_ids.new_ones(batch, past + length)  # (B, past + T)
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=input_ids.device).unsqueeze(0)  # (1, T)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.cat([attention_mask.new_ones(batch, prefix_length), attention_mask], dim=1),
            "position_ids": position_ids,
            CACHE: cache,
        }
        output: CausalLMOutputWithPast = super().forward(**inputs, **kwargs)
        return output

    functools.update_wrapper(forward, GlmForCausalLM.forward, ())  # `generate` reads the signature

    def _prefill_prefix(self, cache: Cache, batch: int) -> None:
        for index, layer in enumerate(self.model.layers):
            dtype = layer.input_layernorm.weight.dtype  # of a quantized model, only the norms have its dtype
            pair = self.prefix[2 * index : 2 * index + 2].to(_device_of(layer), dtype)  # (2, kv_heads, P, head_dim)
            keys, values = pair.unsqueeze(1).expand(-1, batch, -1, -1, -1)  # (B, kv_heads, P, head_dim) each
            cache.update(keys, values, index)


def change_class(model: GlmForCausalLM, cls: type[GlmForCausalLM]) -> None:
    """Give a loaded model, with the same modules, the forward pass of `cls`.

    The hooks of accelerate, on a model over several devices, call the method that the model had when it was loaded.
    """
    model.__class__ = cls
    if hasattr(model, "_old_forward"):
        vars(model)["_old_forward"] = types.MethodType(cls.forward, model)


def _device_of(layer: torch.nn.Module) -> torch.device:
    """Where the layer computes: the layers of a model may be on several devices, offloaded weights on none."""
    device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    weight: torch.Tensor = layer.input_layernorm.weight  # type: ignore[assignment,union-attr]
    return weight.device if device is None else torch.device(device)
