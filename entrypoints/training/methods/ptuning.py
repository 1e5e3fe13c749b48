"""P-Tuning v2 training: a trainable prefix in front of a frozen model, in the format that `prefix_model.py` serves."""

from typing import Any

import torch
from transformers import GlmForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.checkpoint.prefix_encoder import PrefixEncoder
from entrypoints.engines.transformers.prefix_model import PrefixedGlm, change_class
from entrypoints.training.methods.loss import GlmForFineTuning

PREFIX_DROPOUT = 0.1  # in training mode, as `get_prompt` of ChatGLM3
ENCODER = "prefix_encoder."  # prefix of the encoder's tensor names in the state of the model


class GlmForPrefixTuning(PrefixedGlm, GlmForFineTuning):  # type: ignore[no-untyped-call]  # transformers: untyped
    """A frozen model whose prefix comes from `prefix_encoder`, the only trainable part."""

    prefix_encoder: PrefixEncoder
    # for the Trainer, which accepts a quantized model only with something trainable beside its weights: a PEFT adapter
    _hf_peft_config_loaded = True

    @classmethod
    def wrap(cls, model: GlmForCausalLM, model_config: ModelConfig, length: int, projection: bool) -> GlmForCausalLM:
        """Freeze the model in place and add a new float32 prefix of `length` tokens; `projection`: through an MLP."""
        model.requires_grad_(False)
        change_class(model, cls)
        wrapped: Any = model
        wrapped.replace_output_layer()
        # the Trainer does not move quantized models
        wrapped.prefix_encoder = PrefixEncoder(model_config, length, projection).to(model.model.norm.weight.device)
        return model

    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        """As GlmForFineTuning, with the prefix (2 * layers, kv_heads, length, head_dim) of this step."""
        self.prefix = torch.nn.functional.dropout(self.prefix_encoder(), PREFIX_DROPOUT, self.training)
        return super().forward(*args, **kwargs)
