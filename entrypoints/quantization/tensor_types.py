"""The ggml type of each tensor in a GGUF file: the mixtures of llama.cpp, as far as they apply to this architecture.

- Norms and biases stay float32.
- q4_0 stores the embedding and the output layer in 8 bits: an error in the embedding enters every layer, an error in
  the output layer changes the logits directly. This costs 0.27 GB of the 6B model's 3.8 GB.
- The k-quants give more bits to the output layer, to the fused query/key/value projection, and to ffn_down in the outer
  layers and in every third layer between them.
- k-quant blocks hold 256 values. Where a row is not a multiple of 256 (ffn_down of the 6B has 13,696 columns) the next
  better type with blocks of 32 is used, and float16 where 32 does not divide the row either.
"""

from dataclasses import dataclass

import gguf
import torch
from gguf import GGMLQuantizationType as GgmlType

from entrypoints.checkpoint.layout import ModelConfig, TensorMapping, tensor_mappings

BASE_TYPES = {
    "q4_0": GgmlType.Q4_0,
    "q4_k_m": GgmlType.Q4_K,
    "q5_k_m": GgmlType.Q5_K,
    "q8_0": GgmlType.Q8_0,
    "f16": GgmlType.F16,
}
SMALL_BLOCK_TYPES = {GgmlType.Q4_K: GgmlType.Q5_0, GgmlType.Q5_K: GgmlType.Q5_1, GgmlType.Q6_K: GgmlType.Q8_0}
Q8_0_TENSORS_OF_Q4_0 = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class TensorTypePlan:
    """One tensor of a GGUF file: its name, the checkpoint tensors it is built from, and its ggml type."""

    name: str
    entry: TensorMapping
    ggml_type: GgmlType

    @property
    def size(self) -> int:
        """Bytes of its data."""
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[self.ggml_type]
        return torch.Size(self.entry.shape).numel() // int(block_values) * int(block_bytes)


def plan_tensor_types(model_config: ModelConfig, type_: str) -> list[TensorTypePlan]:
    """Every tensor of the model, in the order of the forward pass; type_: a key of BASE_TYPES."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.CHATGLM, model_config.num_layers)
    planned = []
    for entry in tensor_mappings(model_config):
        name = names.get_name(entry.original.removeprefix("transformer."), (".weight", ".bias"))
        if name is None:
            raise AssertionError(f"gguf has no name for {entry.original}")
        planned.append(TensorTypePlan(name, entry, _ggml_type(name, entry, type_, model_config.num_layers)))
    return planned


def _ggml_type(name: str, entry: TensorMapping, type_: str, num_layers: int) -> GgmlType:
    if not entry.columns:
        return GgmlType.F32
    ggml_type = BASE_TYPES[type_]
    if type_ == "q4_0" and name in Q8_0_TENSORS_OF_Q4_0:
        ggml_type = GgmlType.Q8_0
    elif type_ in ("q4_k_m", "q5_k_m"):
        ggml_type = _k_quant_mixture_type(name, ggml_type, num_layers)
    if ggml_type in SMALL_BLOCK_TYPES and not _fills_blocks(entry, ggml_type):
        ggml_type = SMALL_BLOCK_TYPES[ggml_type]
    return ggml_type if _fills_blocks(entry, ggml_type) else GgmlType.F16


def _k_quant_mixture_type(name: str, base: GgmlType, num_layers: int) -> GgmlType:
    if name == "output.weight":
        return GgmlType.Q6_K
    if name.endswith("attn_qkv.weight"):
        return GgmlType.Q5_K if base is GgmlType.Q4_K else GgmlType.Q6_K
    if name.endswith("ffn_down.weight"):
        layer, outer = int(name.split(".")[1]), num_layers // 8
        more_bits = layer < outer or layer >= 7 * num_layers // 8 or (layer - outer) % 3 == 2
        return GgmlType.Q6_K if more_bits else base
    return base


def _fills_blocks(entry: TensorMapping, ggml_type: GgmlType) -> bool:
    return bool(entry.columns[0] % gguf.GGML_QUANT_SIZES[ggml_type][0] == 0)
