"""Forward pass of a converted checkpoint on the CPU with one layer in memory at a time.

Used to compare and to measure, not to generate: every pass reads all weights once, for all prompts together. The 6B
model takes less than 3 GiB this way, whatever its precision on disk.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GlmForCausalLM
from transformers.models.glm.modeling_glm import GlmRMSNorm, GlmRotaryEmbedding

from entrypoints.checkpoint.adapters import Adapter
from entrypoints.checkpoint.layout import tensor_mappings
from entrypoints.checkpoint.lora import LORA_FILE, merge_function
from entrypoints.checkpoint.native import NativeCheckpoint
from entrypoints.engines.transformers.model import read_model_config, without_peft_warning
from entrypoints.errors import UserError
from entrypoints.hardware.resources import available_memory
from entrypoints.sizes import format_size

# Called with the native name of a weight matrix and its input, (T, columns) in float32.
InputObserver = Callable[[str, torch.Tensor], object]
PEFT_NAME = "default"  # of an adapter in PEFT
PEFT_BASE = ".base_layer."  # in the names of weights that PEFT wraps
VOCABULARY_CHUNK = 8192  # rows of the output layer that are converted to float32 at once
FLOAT32_BYTES = 4
WORK_BYTES = 200_000_000  # hidden states, chunks of the output layer or that are quantized, and llama.cpp


def require_layer_memory(
    checkpoint: NativeCheckpoint, action: str, adapter: Adapter | None = None, minimum: int = 0
) -> int:
    """Bytes that a pass takes: one layer in float32, the largest tensor in 16 bits, chunks, and the LoRA twice.

    action: what needs them, for the message. minimum: bytes of another step of it. Raises UserError when less is
    available.
    """
    sizes = {entry.native[0]: math.prod(entry.shape) for entry in tensor_mappings(checkpoint.model_config)}
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    needed = max(FLOAT32_BYTES * layer + 2 * max(sizes.values()), minimum) + WORK_BYTES
    if adapter and adapter.lora:
        needed += 2 * (adapter.folder / LORA_FILE).stat().st_size
    if (free := available_memory()) < needed:
        raise UserError(
            f"{action} needs {format_size(needed)} of memory, {format_size(free)} are available",
            "free memory, or raise the container's limit",
        )
    return needed


class LayerwiseModel:
    """One checkpoint, alone or with a LoRA: merged into its weights by this package, or applied by PEFT.

    B prompts have T tokens each, different from prompt to prompt; H is the hidden size, V the vocabulary size.
    """

    def __init__(
        self,
        checkpoint: NativeCheckpoint,
        merged: Adapter | None = None,
        by_peft: Adapter | None = None,
        dtype: torch.dtype = torch.float32,
        stored_dtype: torch.dtype | None = None,
    ) -> None:
        """merged: a LoRA to merge. by_peft: one that PEFT applies; what it computes comes from PEFT's code alone.

        dtype: that of the layers' computation. stored_dtype: merged weights are rounded to it first.
        """
        self._files = checkpoint.files
        self._dtype = dtype
        self._stored_dtype = stored_dtype
        self._config = read_model_config(checkpoint.folder)
        self._config.dtype = torch.float32
        self._merge = merge_function(merged.lora_factors()) if merged else None
        with torch.device("meta"):
            self._model = GlmForCausalLM(self._config).eval()  # type: ignore[no-untyped-call]  # transformers: untyped
        if by_peft:
            _apply_by_peft(self._model, by_peft)

    @torch.inference_mode()
    def hidden_states(
        self, prompts: Sequence[Sequence[int]], observe: InputObserver | None = None
    ) -> list[torch.Tensor]:
        """Input of the output layer for each prompt, B tensors (T, H) in float32.

        observe: called with every input of a weight matrix.
        """
        embedding = self._read(["model.embed_tokens.weight"])[0]  # (V, H)
        states = [embedding[torch.tensor([list(prompt)])].to(self._dtype) for prompt in prompts]  # (1, T, H) each
        del embedding
        rotary = GlmRotaryEmbedding(self._config)
        for number in range(self._config.num_hidden_layers):
            layer = self._load_layer(number, observe)
            for i, state in enumerate(states):  # in place: the states of many rows are larger than a layer
                positions = torch.arange(state.shape[1])[None]  # (1, T)
                cos_sin = rotary(state, position_ids=positions)  # two of (1, T, rotary dimensions)
                states[i] = layer(state, position_ids=positions, position_embeddings=cos_sin)
            del layer  # before the next one is read
        norm = GlmRMSNorm(self._config.hidden_size, eps=self._config.rms_norm_eps)
        norm.weight.copy_(self._read(["model.norm.weight"])[0])
        for i, state in enumerate(states):
            states[i] = norm(state[0].float())  # (T, H)
            if observe:
                observe("lm_head.weight", states[i])
        return states

    @torch.inference_mode()
    def logits(self, states: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Logits (T, V) in float32 of each (T, H), rows of what `hidden_states` returned."""
        states = list(states)
        parts: list[list[torch.Tensor]] = [[] for _ in states]
        weight = self._read(["lm_head.weight"])[0]  # (V, H)
        delta = _peft_delta(self._model.lm_head)  # (V, H) or None
        for start in range(0, len(weight), VOCABULARY_CHUNK):
            rows = weight[start : start + VOCABULARY_CHUNK].float()  # (≤ VOCABULARY_CHUNK, H)
            if delta is not None:
                rows = rows + delta[start : start + VOCABULARY_CHUNK]
            for part, state in zip(parts, states, strict=True):
                part.append(state @ rows.T)
        return [torch.cat(part, dim=-1) for part in parts]

    def _load_layer(self, number: int, observe: InputObserver | None) -> nn.Module:
        prefix = f"model.layers.{number}."
        layer: nn.Module = copy.deepcopy(self._model.model.layers[number])  # its weights have no data yet
        names = [name for name in layer.state_dict() if ".lora_" not in name]
        tensors = self._read([prefix + name.replace(PEFT_BASE, ".") for name in names])
        weights = {name: tensor.to(self._dtype) for name, tensor in zip(names, tensors, strict=True)}
        layer.load_state_dict(weights, assign=True, strict=False)
        if observe:
            for name, module in layer.named_modules():
                if isinstance(module, nn.Linear):
                    _observe_input(module, f"{prefix}{name}.weight".replace(PEFT_BASE, "."), observe)
        return layer.eval()

    def _read(self, names: list[str]) -> list[torch.Tensor]:
        """The tensors, merged if a LoRA is; mapped again each time, as read pages stay resident with their mapping."""
        stored = self._files.tensors
        mapped: dict[str, torch.Tensor] = {}
        for file in {stored[name].file for name in names}:
            mapped |= self._files.load_file(file)
        if self._merge is None:
            return [mapped[name] for name in names]
        merged = [self._merge(name, mapped[name]) for name in names]
        return [tensor.to(self._stored_dtype or tensor.dtype) for tensor in merged]


def _apply_by_peft(model: GlmForCausalLM, adapter: Adapter) -> None:
    """Add the LoRA to a model without data, in place; only the LoRA's own weights are loaded."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**adapter.peft_config(), inference_mode=True)
    with without_peft_warning():
        peft_model = get_peft_model(model, config, low_cpu_mem_usage=True)
    # not with PEFT's function, which moves the weights to the device of the base model, where they have no data
    stored = load_file(adapter.folder / LORA_FILE)
    named = {f"{name.removesuffix('weight')}{PEFT_NAME}.weight": tensor.float() for name, tensor in stored.items()}
    unknown = peft_model.load_state_dict(named, strict=False, assign=True).unexpected_keys
    assert not unknown, f"PEFT has no module for {unknown}"


def _peft_delta(module: nn.Module) -> torch.Tensor | None:
    """What PEFT adds to the weight of a module, None for a module without LoRA."""
    if not hasattr(module, "get_delta_weight"):
        return None
    layer: Any = module
    delta: torch.Tensor = layer.get_delta_weight(PEFT_NAME)
    return delta


def _observe_input(module: nn.Linear, name: str, observe: InputObserver) -> None:
    # inputs[0] is (1, T, columns)
    module.register_forward_pre_hook(lambda _, inputs: observe(name, inputs[0][0].float()))
