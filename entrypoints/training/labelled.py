"""GlmForCausalLM that scores its vocabulary only where there is something to learn.

A third and more of a row is prompt and padding, which have no label. The scores of one place take 65,024 numbers, in
float32, thrice: leaving those places out changes no loss and saves their time and memory.
"""

import torch
from transformers import GlmForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from entrypoints.prompt import IGNORED


class LabelledGlm(GlmForCausalLM):
    """The same modules, another loss; without labels everything is as it was."""

    smoothing = 0.0  # share of a label given to all tokens alike, while learning

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        labels=None,
        num_items_in_batch=None,
        **kwargs,
    ):
        """As GlmForCausalLM; with labels (rows, length) `logits` are those in front of a label, (labels, vocabulary).

        num_items_in_batch: labels of the whole step, which the sum of losses is divided by; None: those of this batch.
        """
        if labels is None:
            return super().forward(input_ids, attention_mask, position_ids, cache, **kwargs)
        hidden = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache, **kwargs
        ).last_hidden_state
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        taught = following != IGNORED
        logits = self.lm_head(hidden[taught])
        loss = torch.nn.functional.cross_entropy(
            logits.float(),
            following[taught],
            reduction="mean" if num_items_in_batch is None else "sum",
            label_smoothing=self.smoothing if self.training else 0.0,
        )
        if num_items_in_batch is not None:
            loss = loss / num_items_in_batch
        return CausalLMOutputWithPast(loss=loss, logits=logits)
