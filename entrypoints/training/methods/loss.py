"""GlmForCausalLM that computes logits only at positions that have a label, and their gradient in the same pass.

A third or more of a row is prompt and padding, which have no label. The logits of one position are 65,024 values, and
the loss of torch holds four float32 copies of them. Here the logits of LOSS_POSITIONS positions exist at a time: their
gradient with regard to the hidden states is computed at once, and no loss changes. Liger's fused linear cross entropy
does the same with a Triton kernel, which needs a compiler at run time; that of torch has no label smoothing.
"""

from typing import Any

import torch
from transformers import Cache, GlmConfig, GlmForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from entrypoints.chat_format.prompt import IGNORE_INDEX

LOSS_POSITIONS = 1024  # whose logits are in memory together; their products with the weights still fill a GPU
CPU_ROWS = 16  # of them computed at once on a CPU: they fit into its cache. A GPU takes all of them in one kernel
# Gradients of logits in float16 are multiplied by it: a probability of 1 / 65,024 has few bits left there
FLOAT16_SCALE = 1024.0


class OutputLayer(torch.nn.Linear):
    """The output layer of the model; with labels it returns the loss and never all logits.

    The loss is computed inside the module because ZeRO-3 gathers the weights of a module while it runs.
    """

    def forward(self, input: torch.Tensor, labels: torch.Tensor | None = None, smoothing: float = 0.0) -> torch.Tensor:
        """Logits (..., V) of hidden states (..., H); with labels (N,) the sum of the losses of input (N, H)."""
        if labels is None:
            return super().forward(input)
        return linear_cross_entropy(input, self.weight, labels, smoothing)

    def losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of each label, (N,); logits are kept for a backward pass only."""
        found = []
        for states, chosen in zip(
            torch.split(hidden, LOSS_POSITIONS), torch.split(labels, LOSS_POSITIONS), strict=True
        ):
            logits = self(states).float()  # (C, V)
            found.append(logits.logsumexp(1) - logits.gather(1, chosen[:, None])[:, 0])
        return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)


class GlmForFineTuning(GlmForCausalLM):  # type: ignore[no-untyped-call]  # transformers: __init_subclass__ is untyped
    """The same modules with another loss; without labels the forward pass is unchanged."""

    label_smoothing: float = 0.0  # share of the label spread over the vocabulary, in training mode only
    lm_head: OutputLayer

    def __init__(self, config: GlmConfig) -> None:
        super().__init__(config)
        self.replace_output_layer()

    def replace_output_layer(self) -> None:
        """Give the output layer its loss, in place: a model that was loaded as another class gets this class later."""
        self.lm_head.__class__ = OutputLayer

    def forward(  # noqa: PLR0913 - the signature of GlmForCausalLM
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        row_sums: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As GlmForCausalLM; with labels (B, T) the loss alone, without logits.

        num_items_in_batch: labels of the whole optimizer step, by which the sum of losses is divided; None: the labels
        of this batch. row_sums: return the sum of losses and the number of labels of each row, (B, 2), as `logits`.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache": cache,
            **kwargs,
        }
        if labels is None:
            output: CausalLMOutputWithPast = super().forward(**inputs)
            return output
        hidden = self.model(**inputs).last_hidden_state  # (B, T, H)
        next_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # (B, T)
        has_label = next_labels != IGNORE_INDEX  # (B, T), N of them true
        chosen = next_labels[has_label]  # (N,)
        if row_sums:
            losses = self.lm_head.losses(hidden[has_label], chosen)
            rows = has_label.nonzero()[:, 0]  # (N,)
            sums = losses.new_zeros(len(labels)).index_add(0, rows, losses)  # (B,)
            return CausalLMOutputWithPast(logits=torch.stack([sums, has_label.sum(1).to(sums)], dim=1))
        loss = self.lm_head(hidden[has_label], chosen, self.label_smoothing if self.training else 0.0)
        return CausalLMOutputWithPast(
            loss=loss / (has_label.sum() if num_items_in_batch is None else num_items_in_batch)
        )


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    """Sum of the cross entropies of labels (N,) under the logits of hidden (N, H) with weight (V, H); float32.

    Value and gradients are those of torch.nn.functional.cross_entropy with reduction "sum" and `label_smoothing`.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    loss: torch.Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, (dtype, smoothing))  # type: ignore[no-untyped-call]  # torch
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Differentiable once: the gradients are computed in the forward pass, while the logits exist."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        options: tuple[torch.dtype, float],
    ) -> torch.Tensor:
        """options: the dtype to compute in, and the label smoothing."""
        dtype, smoothing = options
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        scale = FLOAT16_SCALE if dtype == torch.float16 else 1.0
        matrix = weight.to(dtype)  # (V, H)
        kept = torch.float32 if dtype == torch.float16 else dtype
        of_hidden = torch.empty_like(hidden, dtype=kept) if needs_hidden else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(labels), LOSS_POSITIONS):
                part = slice(start, start + LOSS_POSITIONS)
                states = hidden[part].to(dtype)  # (C, H)
                logits = states @ matrix.T  # (C, V)
                total += _loss_and_gradient(logits, labels[part], smoothing, scale)
                if of_hidden is not None:
                    of_hidden[part] = logits @ matrix
                if of_weight is not None:
                    of_weight += logits.T @ states
        ctx.gradients, ctx.scale = (of_hidden, of_weight), scale
        ctx.dtypes = (hidden.dtype, weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The stored gradients times the gradient of the loss."""
        (gradients, ctx.gradients), factor = (ctx.gradients, None), grad_outputs[0] / ctx.scale
        found = (
            None if gradient is None else gradient.mul_(factor).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (*found, None, None)


def _loss_and_gradient(logits: torch.Tensor, labels: torch.Tensor, smoothing: float, scale: float) -> torch.Tensor:
    """Sum of the losses; logits (C, V) become softmax(logits) minus the smoothed one-hot labels (C,), times scale."""
    rows = CPU_ROWS if logits.device.type == "cpu" else len(labels)
    total = logits.new_zeros((), dtype=torch.float32)
    for part, chosen in zip(torch.split(logits, rows), torch.split(labels, rows), strict=True):
        column = chosen[:, None]  # (R, 1)
        logs = part.log_softmax(1, dtype=torch.float32)  # (R, V)
        total -= (1 - smoothing) * logs.gather(1, column).sum()
        if smoothing:
            total -= smoothing * logs.mean(1).sum()
        gradient = logs.exp_()  # (R, V)
        if smoothing:
            gradient -= smoothing / logits.shape[1]
        gradient.scatter_add_(1, column, gradient.new_full(column.shape, smoothing - 1))
        part.copy_(gradient.mul_(scale) if scale != 1 else gradient)
    return total
