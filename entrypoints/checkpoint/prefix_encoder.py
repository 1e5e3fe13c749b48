"""What P-Tuning v2 trains: one embedding row for each place of the prefix, with or without an MLP behind it."""

from collections.abc import Mapping

import torch
from torch import nn

from entrypoints.checkpoint.layout import Shape


class PrefixEncoder(nn.Module):
    """Makes the keys and values of a prefix; parameters are named as in ChatGLM3's `prefix_encoder`."""

    def __init__(self, shape: Shape, length: int, projected: bool) -> None:
        super().__init__()
        self.shape = shape
        values = shape.layers * 2 * shape.groups * shape.head_dim
        self.embedding = nn.Embedding(length, values)
        self.trans = (
            nn.Sequential(nn.Linear(values, shape.hidden), nn.Tanh(), nn.Linear(shape.hidden, values))
            if projected
            else nn.Identity()
        )

    def forward(self) -> torch.Tensor:
        """Keys at even and values at odd places, (layers * 2, groups, length, head_dim)."""
        weight = self.embedding.weight
        places = torch.arange(self.embedding.num_embeddings, device=weight.device)
        flat = self.trans(self.embedding(places))
        shape = self.shape
        return flat.view(-1, shape.layers * 2, shape.groups, shape.head_dim).permute(1, 2, 0, 3).contiguous()


def encoder_shapes(shape: Shape, length: int, projected: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of its tensors, without making them."""
    with torch.device("meta"):
        encoder = PrefixEncoder(shape, length, projected)
    return {name: tuple(tensor.shape) for name, tensor in encoder.named_parameters()}


def finished_prefix(tensors: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
    """The keys and values that trained tensors stand for, in float32."""
    length = len(tensors["embedding.weight"])
    encoder = PrefixEncoder(shape, length, "trans.0.weight" in tensors)
    encoder.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    with torch.no_grad():
        return encoder()
