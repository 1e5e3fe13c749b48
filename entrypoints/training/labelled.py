"""GlmForCausalLM that scores its vocabulary only where there is something to learn.

A third and more of a row is prompt and padding, which have no label. The scores of one place take 65,024 numbers in
float32, and torch's own loss keeps four of each: leaving those places out, and turning the others' scores into their
gradient where they lie, changes no loss and saves time and memory.
"""

import torch
from transformers import GlmForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from entrypoints.prompt import IGNORED

PLACES = 16  # whose scores are worked on at once: what the processor's cache holds


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
        """As GlmForCausalLM; with labels (rows, length) the loss alone.

        num_items_in_batch: labels of the whole step, which the sum of losses is divided by; None: those of this batch.
        """
        if labels is None:
            return super().forward(input_ids, attention_mask, position_ids, cache, **kwargs)
        hidden = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache, **kwargs
        ).last_hidden_state
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        taught = following != IGNORED
        loss = CrossEntropy.apply(
            self.lm_head(hidden[taught]).float(), following[taught], self.smoothing if self.training else 0.0
        )
        return CausalLMOutputWithPast(loss=loss / (taught.sum() if num_items_in_batch is None else num_items_in_batch))


class CrossEntropy(torch.autograd.Function):
    """Sum of the cross entropies of scores (places, vocabulary) in float32 with labels (places), once differentiable.

    The scores' memory holds their gradient afterwards. torch.nn.functional.cross_entropy with reduction "sum" gives the
    same; linear_cross_entropy saves more memory, but knows no smoothing and needs the output layer's weights in one
    piece, which ZeRO-3 divides.
    """

    @staticmethod
    def forward(ctx, scores: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
        """`smoothing` of each label is given to all tokens alike."""
        losses = []
        for part, label in zip(scores.split(PLACES), labels.split(PLACES), strict=True):
            label = label[:, None]
            total = part.logsumexp(1, keepdim=True)
            wanted = (1 - smoothing) * part.gather(1, label) + smoothing * part.mean(1, keepdim=True)
            losses.append(total - wanted)
            part.sub_(total).exp_().sub_(smoothing / part.shape[1])
            part.scatter_add_(1, label, torch.full_like(total, smoothing - 1))
        ctx.gradient = scores
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx, outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(outer), None, None
