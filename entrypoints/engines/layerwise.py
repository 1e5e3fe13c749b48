"""The logits of a converted checkpoint with one layer in memory at a time, on the processor.

For comparing and measuring, not for answering: each run reads all weights once, for all its prompts together. The 6B
takes less than 3 GiB this way, whatever its precision on disk.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from transformers import GlmConfig
from transformers.models.glm.modeling_glm import GlmDecoderLayer, GlmRMSNorm, GlmRotaryEmbedding

from entrypoints.checkpoint.adapters import Adapter, lora_halves, merging
from entrypoints.checkpoint.native import NativeCheckpoint
from entrypoints.checkpoint.original import read_json

Watch = Callable[[str, torch.Tensor], object]  # native name of a weight, what it is multiplied with: (tokens, columns)


class Layerwise:
    """One checkpoint, with a LoRA merged into its weights or, with `beside`, computed beside them as PEFT does."""

    def __init__(
        self,
        checkpoint: NativeCheckpoint,
        adapter: Adapter | None = None,
        beside: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._files = checkpoint.files
        self._layers = checkpoint.shape.layers
        self._dtype = dtype
        self._config = GlmConfig(
            **read_json(checkpoint.folder / "config.json") | {"dtype": "float32"}, attn_implementation="sdpa"
        )
        self._changed = merging(adapter) if adapter and not beside else None
        self._halves, self._scale = lora_halves(adapter) if adapter and beside else ({}, 0.0)

    @torch.inference_mode()
    def hidden(self, prompts: Sequence[Sequence[int]], watch: Watch | None = None) -> list[torch.Tensor]:
        """What the output layer sees of each prompt, (tokens, hidden); `watch` is told every input of a matrix."""
        embedding = self._read(["model.embed_tokens.weight"])[0]
        states = [embedding[torch.tensor([list(prompt)])].to(self._dtype) for prompt in prompts]
        del embedding
        rotary = GlmRotaryEmbedding(self._config)
        for number in range(self._layers):
            layer = self._layer(number, watch)
            for place, state in enumerate(states):  # over the old ones: many rows are larger than a layer
                positions = torch.arange(state.shape[1])[None]
                turn = rotary(state, position_ids=positions)
                states[place] = layer(state, position_ids=positions, position_embeddings=turn)
            del layer  # before the next one is read
        norm = GlmRMSNorm(self._config.hidden_size, eps=self._config.rms_norm_eps)
        norm.weight.copy_(self._read(["model.norm.weight"])[0])
        for place, state in enumerate(states):
            states[place] = norm(state[0].float())
            if watch:
                watch("lm_head.weight", states[place])
        return states

    @torch.inference_mode()
    def logits(self, states: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Logits of chosen rows of `hidden`'s results, (tokens, vocabulary) in float32."""
        states = list(states)
        parts: list[list[torch.Tensor]] = [[] for _ in states]
        for rows in self._read(["lm_head.weight"])[0].split(8192):
            rows = rows.float()
            for part, state in zip(parts, states, strict=True):
                part.append(state @ rows.T)
        return [torch.cat(part, dim=-1) for part in parts]

    def _layer(self, number: int, watch: Watch | None) -> nn.Module:
        prefix = f"model.layers.{number}."
        with torch.device("meta"):
            layer = GlmDecoderLayer(self._config, number)
        names = list(layer.state_dict())
        tensors = self._read([prefix + name for name in names])
        weights = {name: tensor.to(self._dtype) for name, tensor in zip(names, tensors, strict=True)}
        layer.load_state_dict(weights, assign=True)
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                self._hook(module, f"{prefix}{name}.weight", watch)
        return layer.eval()

    def _hook(self, module: nn.Linear, name: str, watch: Watch | None) -> None:
        if watch:
            module.register_forward_pre_hook(lambda _, given: watch(name, given[0][0].float()))
        if name in self._halves:
            down, up = (half.to(self._dtype) for half in self._halves[name])
            scale = self._scale
            module.register_forward_hook(lambda _, given, out: out + scale * (given[0] @ down.T) @ up.T)

    def _read(self, names: list[str]) -> list[torch.Tensor]:
        """Mapped anew each time, as what was read stays in memory as long as its mapping does."""
        stored = self._files.tensors
        mapped = {}
        for file in {stored[name].file for name in names}:
            mapped |= self._files.of_file(file)
        change = self._changed or (lambda name, tensor: tensor)
        return [change(name, mapped[name]) for name in names]
