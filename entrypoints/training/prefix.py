"""P-Tuning v2: a prefix that is learnt in front of a frozen model, fed as `engines/prefix.py` serves it."""

import torch
from transformers import GlmForCausalLM

from entrypoints.checkpoint.layout import Shape
from entrypoints.checkpoint.prefix_encoder import PrefixEncoder
from entrypoints.engines.prefix import PrefixedGlm
from entrypoints.training.labelled import LabelledGlm

DROPOUT = 0.1  # of the prefix while it is learnt, as ChatGLM3's `get_prompt`
ENCODER = "prefix_encoder."  # in front of its names in the model's state


class PrefixLearner(PrefixedGlm, LabelledGlm):
    """A model whose prefix comes from `prefix_encoder`, its only part that learns."""

    prefix_encoder: PrefixEncoder

    @classmethod
    def over(cls, model: GlmForCausalLM, shape: Shape, length: int, projected: bool) -> "PrefixLearner":
        """The same model, frozen, with a new prefix in float32."""
        model.requires_grad_(False)
        model.__class__ = cls  # the same modules, another forward
        model.prefix_encoder = PrefixEncoder(shape, length, projected)
        return model

    def forward(self, *args, **kwargs):
        """As PrefixedGlm."""
        self.prefix = torch.nn.functional.dropout(self.prefix_encoder(), DROPOUT, self.training)
        return super().forward(*args, **kwargs)
