"""The trainable module of P-Tuning v2: one embedding row per prefix position, optionally followed by an MLP."""

from collections.abc import Mapping

import torch
from torch import nn

from entrypoints.checkpoint.layout import ModelConfig


class PrefixEncoder(nn.Module):
    """Computes the keys and values of a prefix; parameters are named as in ChatGLM3's `prefix_encoder`."""

    def __init__(self, model_config: ModelConfig, length: int, projected: bool) -> None:
        """projected: with the MLP between embedding and keys and values."""
        super().__init__()
        self.model_config = model_config
        width = model_config.num_layers * 2 * model_config.num_kv_heads * model_config.head_dim
        hidden_size = model_config.hidden_size
        self.embedding = nn.Embedding(length, width)
        self.trans = (
            nn.Sequential(nn.Linear(width, hidden_size), nn.Tanh(), nn.Linear(hidden_size, width))
            if projected
            else nn.Identity()
        )

    def forward(self) -> torch.Tensor:
        """Keys at even and values at odd indices, (num_layers * 2, num_kv_heads, length, head_dim)."""
        model_config, weight = self.model_config, self.embedding.weight
        positions = torch.arange(self.embedding.num_embeddings, device=weight.device)
        flat: torch.Tensor = self.trans(self.embedding(positions))  # (length, width)
        split = flat.view(-1, model_config.num_layers * 2, model_config.num_kv_heads, model_config.head_dim)
        return split.permute(1, 2, 0, 3).contiguous()


def encoder_shapes(model_config: ModelConfig, length: int, projected: bool) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape, without allocating them."""
    with torch.device("meta"):
        encoder = PrefixEncoder(model_config, length, projected)
    return {name: tuple(tensor.shape) for name, tensor in encoder.named_parameters()}


def compute_prefix(tensors: Mapping[str, torch.Tensor], model_config: ModelConfig) -> torch.Tensor:
    """Keys and values of trained parameters, float32, (num_layers * 2, num_kv_heads, length, head_dim)."""
    length = len(tensors["embedding.weight"])
    encoder = PrefixEncoder(model_config, length, "trans.0.weight" in tensors)
    encoder.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    with torch.no_grad():
        prefix: torch.Tensor = encoder()
    return prefix
