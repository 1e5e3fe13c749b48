"""The two layouts of one model: the original tensor names and those of transformers' GlmForCausalLM.

One table (`tensor_mappings`) maps original tensors to native ones. Reading, writing, checking and both directions of
conversion use it. No file is read here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from entrypoints.checkpoint.config_numbers import check_other_numbers, read_model_numbers
from entrypoints.checkpoint.config_values import (
    LINEAR_ROPE,
    NATIVE_ARCHITECTURE,
    NATIVE_ROPE,
    check_native_values,
)
from entrypoints.checkpoint.original_config import ORIGINAL_DEFAULTS, ORIGINAL_KEYS, check_original_values
from entrypoints.errors import UserError

ROTARY_BUFFER = "transformer.rotary_pos_emb.inv_freq"  # computed from the config; the native layout omits it
NATIVE_KEYS = {  # in the converted one
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_parameters.rope_theta",
}
LINEAR_ROPE_KEY = {"position_divisor": "rope_parameters.factor"}  # present only if positions are divided
# type of a folder written by `glm quantize` -> the equivalent value of --load-in
FOLDER_QUANTIZATIONS = {"int8": "8bit", "nf4": "4bit"}
NF4_BLOCK_SIZE = 64  # parameters that share one scale in 4 bits


@dataclass(frozen=True)
class ModelConfig:
    """The dimensions in which the checkpoints of the family differ."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int  # heads of keys and values (multi-query groups)
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_length: int  # tokens, prompt and answer together
    rms_norm_eps: float
    rope_ratio: float  # multiplies the base of the rotary embedding: 1 in ChatGLM3-6B, more in its long variants
    position_divisor: float = 1  # divides the positions: more than 1 in ChatGLM2-6B-32k

    @classmethod
    def from_original(cls, config: dict[str, Any], file: Path, ratio_scales: str = "base") -> "ModelConfig":
        """Read the original config.json. Raises UserError: a field is missing or describes another model.

        ratio_scales: what `rope_ratio` changes, as in `Family.rope_ratio_scales`.
        """
        check_original_values(config, file)
        try:
            read = cls.from_numbers({**ORIGINAL_DEFAULTS, **config}, ORIGINAL_KEYS, file)
        except KeyError as error:
            raise UserError(f"{file} lacks {error}", "use the config.json of the checkpoint's repository") from error
        return read if ratio_scales == "base" else replace(read, rope_ratio=1, position_divisor=read.rope_ratio)

    @classmethod
    def from_native(cls, config: dict[str, Any], file: Path, quantized: bool = False) -> "ModelConfig":
        """Read a converted config.json. Raises UserError: it belongs to another model or layout.

        quantized: accept matrices stored in 8 or 4 bits, which support inference only.
        """
        if config.get("model_type") == "chatglm":
            raise UserError(f"{file} is in the original layout", "convert it first: glm convert SRC DST")
        if config.get("model_type") != "glm":
            raise UserError(
                f"{file} has model_type {config.get('model_type')!r}",
                "give the path of a converted ChatGLM3 checkpoint",
            )
        if stored_quantization(config, file) and not quantized:
            raise UserError(
                f"{file.parent} is already quantized: inference only, no fine-tuning, conversion or quantization",
                "use the checkpoint it was created from (`source` in its manifest.json)",
            )
        check_other_numbers(config, file)
        try:
            stored_rope = config["rope_parameters"]
            rope = {
                f"rope_parameters.{key}": stored_rope[key] for key in ("rope_theta", "factor") if key in stored_rope
            }
            scaling = LINEAR_ROPE_KEY if "rope_type" in stored_rope and stored_rope["rope_type"] == LINEAR_ROPE else {}
            model_config = cls.from_numbers(config | rope, NATIVE_KEYS | scaling, file)
        except (KeyError, TypeError) as error:
            raise UserError(f"{file} lacks {error}", "convert the checkpoint again") from error
        check_native_values(config, model_config.vocab_size, file)
        return model_config

    @classmethod
    def from_numbers(cls, values: Mapping[str, Any], keys: Mapping[str, str], file: Path) -> "ModelConfig":
        """The only way from a file to an object. keys: field -> key in `values`; `rope_theta` replaces `rope_ratio`.

        Raises UserError: a number is of another type or out of range, KeyError: it is missing.
        """
        return cls(**read_model_numbers(values, keys, file))

    def native_config(self, dtype: str, stop_ids: tuple[int, ...], pad_id: int) -> dict[str, Any]:
        """config.json of GlmForCausalLM. dtype: torch's name without the prefix, `float16`."""
        return {
            **NATIVE_ARCHITECTURE,
            "model_type": "glm",
            "attention_dropout": 0.0,
            "dtype": dtype,
            "eos_token_id": list(stop_ids),
            "head_dim": self.head_dim,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.context_length,
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "pad_token_id": pad_id,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": self._rope_parameters(),
            "vocab_size": self.vocab_size,
        }

    def _rope_parameters(self) -> dict[str, Any]:
        rope = {**NATIVE_ROPE, "rope_theta": 10000 * self.rope_ratio}
        return (
            rope if self.position_divisor == 1 else rope | {"rope_type": LINEAR_ROPE, "factor": self.position_divisor}
        )

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of query, key and value in the fused projection."""
        return self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.head_dim

    def kv_cache_bytes(self, tokens: int) -> int:
        """Bytes of the key-value cache of `tokens` tokens, in half precision."""
        return tokens * self.num_layers * sum(self.qkv_rows[1:]) * 2


@dataclass(frozen=True)
class TensorMapping:
    """One original tensor and the native tensors that it concatenates along its rows."""

    original: str
    native: tuple[str, ...]
    rows: tuple[int, ...]  # rows of each native tensor
    columns: tuple[int, ...]  # remaining dimensions, () for a vector

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the original tensor."""
        return (sum(self.rows), *self.columns)

    def native_shapes(self) -> dict[str, tuple[int, ...]]:
        """Native tensor name -> shape."""
        return {name: (rows, *self.columns) for name, rows in zip(self.native, self.rows, strict=True)}


def tensor_mappings(model_config: ModelConfig) -> list[TensorMapping]:
    """Every tensor of the model except ROTARY_BUFFER, in the order of the forward pass."""
    vocab_size, hidden_size = model_config.vocab_size, model_config.hidden_size
    return [
        _mapping("embedding.word_embeddings.weight", "model.embed_tokens.weight", vocab_size, hidden_size),
        *(mapping for layer in range(model_config.num_layers) for mapping in _layer_mappings(layer, model_config)),
        _mapping("encoder.final_layernorm.weight", "model.norm.weight", hidden_size),
        _mapping("output_layer.weight", "lm_head.weight", vocab_size, hidden_size),
    ]


def _layer_mappings(layer: int, model_config: ModelConfig) -> list[TensorMapping]:
    old, new = f"encoder.layers.{layer}.", f"model.layers.{layer}."
    hidden_size, intermediate_size = model_config.hidden_size, model_config.intermediate_size
    qkv = tuple(f"{new}self_attn.{part}_proj." for part in "qkv")
    qkv_rows = model_config.qkv_rows
    fused = f"transformer.{old}self_attention.query_key_value."
    return [
        _mapping(old + "input_layernorm.weight", new + "input_layernorm.weight", hidden_size),
        TensorMapping(fused + "weight", tuple(name + "weight" for name in qkv), qkv_rows, (hidden_size,)),
        TensorMapping(fused + "bias", tuple(name + "bias" for name in qkv), qkv_rows, ()),
        _mapping(old + "self_attention.dense.weight", new + "self_attn.o_proj.weight", hidden_size, qkv_rows[0]),
        _mapping(old + "post_attention_layernorm.weight", new + "post_attention_layernorm.weight", hidden_size),
        _mapping(old + "mlp.dense_h_to_4h.weight", new + "mlp.gate_up_proj.weight", 2 * intermediate_size, hidden_size),
        _mapping(old + "mlp.dense_4h_to_h.weight", new + "mlp.down_proj.weight", hidden_size, intermediate_size),
    ]


def stored_quantization(config: dict[str, Any], file: Path) -> str | None:
    """How the matrices of the layers are stored according to config.json: `8bit`, `4bit`, or None (not quantized).

    Raises UserError: a quantization that this package does not write.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    if isinstance(quantization, dict) and quantization.get("quant_method") == "bitsandbytes":
        if quantization.get("load_in_8bit"):
            return FOLDER_QUANTIZATIONS["int8"]
        if quantization.get("load_in_4bit") and quantization.get("bnb_4bit_quant_type") == "nf4":
            return FOLDER_QUANTIZATIONS["nf4"]
    raise UserError(
        f"{file} has an unsupported quantization_config",
        f"supported are the {', '.join(FOLDER_QUANTIZATIONS)} folders that glm quantize writes",
    )


def expected_shapes(model_config: ModelConfig, load_in: str | None) -> dict[str, tuple[int, ...]]:
    """Native tensor name -> shape as stored, including the scales of matrices stored in 8 or 4 bits (`load_in`).

    The `quant_state` tensors of 4 bits are omitted: they contain JSON text of varying length.
    """
    shapes = {name: size for entry in tensor_mappings(model_config) for name, size in entry.native_shapes().items()}
    if load_in is None:
        return shapes
    stored: dict[str, tuple[int, ...]] = {}
    for name, size in shapes.items():
        if ".layers." not in name or len(size) == 1:
            stored[name] = size
        elif load_in == FOLDER_QUANTIZATIONS["int8"]:
            stem = name.removesuffix("weight")
            stored |= {name: size, f"{stem}SCB": size[:1], f"{stem}weight_format": ()}
        else:
            count = size[0] * size[1]
            scales = {f"{name}.absmax": (-(-count // NF4_BLOCK_SIZE),), f"{name}.quant_map": (16,)}
            stored |= {name: (-(-count // 2), 1), **scales}  # two 4-bit values per byte
    return stored


def _mapping(original: str, native: str, rows: int, *columns: int) -> TensorMapping:
    return TensorMapping(f"transformer.{original}", (native,), (rows,), columns)
