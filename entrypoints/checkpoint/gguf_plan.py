"""Which tensor of a GGUF file is stored in which kind: llama.cpp's mixtures, as far as this architecture has them.

Norms and biases stay float32. With q4_0 the embedding and the output layer get 8 bits: every error of the one enters
all layers, every error of the other goes straight into the choice of the token; it costs 0.27 GB of the 6B's 3.8.
The k-quants give more bits to the output layer, to the fused query, key and value, and to ffn_down in the outer layers
and in every third between them. They come in blocks of 256: where rows are no multiple of it, as ffn_down's 13,696 in
the 6B, the next better kind with blocks of 32 stands in, and float16 where those do not fit either.
"""

from dataclasses import dataclass

import gguf
import torch
from gguf import GGMLQuantizationType as Kind

from entrypoints.checkpoint.layout import Entry, Shape, tensors

MOST = {"q4_0": Kind.Q4_0, "q4_k_m": Kind.Q4_K, "q5_k_m": Kind.Q5_K, "q8_0": Kind.Q8_0, "f16": Kind.F16}
IN_SMALL_BLOCKS = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}
EIGHT_BITS = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class Plan:
    """One tensor of the file: its name, where its rows come from, and how it is stored."""

    name: str
    entry: Entry
    kind: Kind

    @property
    def size(self) -> int:
        """Bytes of its data."""
        per_block, bytes_ = gguf.GGML_QUANT_SIZES[self.kind]
        return torch.Size(self.entry.shape).numel() // per_block * bytes_


def plans(shape: Shape, type_: str) -> list[Plan]:
    """Every tensor of the model, in the order of the forward pass; type_: one of gguf.TYPES."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.CHATGLM, shape.layers)
    found = []
    for entry in tensors(shape):
        name = names.get_name(entry.original.removeprefix("transformer."), (".weight", ".bias"))
        found.append(Plan(name, entry, _kind(name, entry, type_, shape.layers)))
    return found


def _kind(name: str, entry: Entry, type_: str, layers: int) -> Kind:
    if not entry.columns:
        return Kind.F32
    kind = MOST[type_]
    if type_ == "q4_0" and name in EIGHT_BITS:
        kind = Kind.Q8_0
    elif type_ in ("q4_k_m", "q5_k_m"):
        kind = _mixed(name, kind, layers)
    if kind in IN_SMALL_BLOCKS and not _fills_blocks(entry, kind):
        kind = IN_SMALL_BLOCKS[kind]
    return kind if _fills_blocks(entry, kind) else Kind.F16


def _mixed(name: str, kind: Kind, layers: int) -> Kind:
    if name == "output.weight":
        return Kind.Q6_K
    if name.endswith("attn_qkv.weight"):
        return Kind.Q5_K if kind is Kind.Q4_K else Kind.Q6_K
    if name.endswith("ffn_down.weight"):
        number, outer = int(name.split(".")[1]), layers // 8
        better = number < outer or number >= 7 * layers // 8 or (number - outer) % 3 == 2
        return Kind.Q6_K if better else kind
    return kind


def _fills_blocks(entry: Entry, kind: Kind) -> bool:
    return entry.columns[0] % gguf.GGML_QUANT_SIZES[kind][0] == 0
