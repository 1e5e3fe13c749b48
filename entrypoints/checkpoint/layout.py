"""The two layouts of one model: ChatGLM3's original names and those of transformers' GlmForCausalLM.

One table (`tensors`) says which original tensor becomes which native ones; reading, writing, checking and the way back
all walk it. No file is read here.
"""

from dataclasses import dataclass
from pathlib import Path

from entrypoints.errors import UserError

ROTARY = "transformer.rotary_pos_emb.inv_freq"  # derived from the config: dropped one way, made anew the other
VOCABULARY_ROWS = 65024
AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
}
# What the architecture fixes: an original config that says otherwise is another model.
FIXED = {
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "multi_query_attention": True,
    "post_layer_norm": True,
    "rmsnorm": True,
    "tie_word_embeddings": False,
}


# What glm quantize makes of a folder that stays one -> what settings.LOADS calls the same in memory.
FOLDER_TYPES = {"int8": "8bit", "nf4": "4bit"}
BLOCK = 64  # numbers that share one scale in 4 bits


@dataclass(frozen=True)
class Shape:
    """The numbers that tell one checkpoint of the family from another."""

    layers: int
    hidden: int
    heads: int
    groups: int  # heads that keys and values have
    head_dim: int
    ffn: int
    vocabulary: int
    window: int  # tokens of prompt and answer together
    norm_eps: float
    rope_ratio: float  # 1 in the 6B, more in the 32k and 128k variants

    @classmethod
    def from_original(cls, config: dict, file: Path) -> "Shape":
        """Read the original config.json; raises UserError naming what makes it another model."""
        _refuse_other_models(config, file)
        wrong = [f"{key}={config[key]!r}" for key, value in FIXED.items() if config.get(key, value) != value]
        if config.get("quantization_bit"):
            wrong.append(f"quantization_bit={config['quantization_bit']}")
        if wrong:
            raise UserError(f"{file} has {', '.join(wrong)}", "convert an unquantised ChatGLM3 checkpoint")
        try:
            return cls(
                layers=config["num_layers"],
                hidden=config["hidden_size"],
                heads=config["num_attention_heads"],
                groups=config["multi_query_group_num"],
                head_dim=config["kv_channels"],
                ffn=config["ffn_hidden_size"],
                vocabulary=config.get("padded_vocab_size", VOCABULARY_ROWS),
                window=config["seq_length"],
                norm_eps=config["layernorm_epsilon"],
                rope_ratio=config.get("rope_ratio", 1),
            )
        except KeyError as error:
            raise UserError(f"{file} lacks {error}", "take config.json from the checkpoint's own repository") from error

    @classmethod
    def from_native(cls, config: dict, file: Path, quantised: bool = False) -> "Shape":
        """Read a converted config.json; raises UserError when it is none of this product's.

        quantised: may its matrices be stored in 8 or 4 bits? They can answer, and nothing else can be made of them.
        """
        if config.get("model_type") == "chatglm":
            raise UserError(f"{file} is in the original layout", "convert it first: glm convert SRC DST")
        if config.get("model_type") != "glm":
            raise UserError(
                f"{file} says model_type {config.get('model_type')!r}",
                "name the folder of a converted ChatGLM3 checkpoint",
            )
        if stored_in(config, file) and not quantised:
            raise UserError(
                f"{file.parent} is quantised already: it can be asked, not tuned, converted or quantised again",
                "name the checkpoint it was made from (`source` in its manifest.json)",
            )
        try:
            return cls(
                layers=config["num_hidden_layers"],
                hidden=config["hidden_size"],
                heads=config["num_attention_heads"],
                groups=config["num_key_value_heads"],
                head_dim=config["head_dim"],
                ffn=config["intermediate_size"],
                vocabulary=config["vocab_size"],
                window=config["max_position_embeddings"],
                norm_eps=config["rms_norm_eps"],
                rope_ratio=config["rope_parameters"]["rope_theta"] / 10000,
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{file} lacks {error}", "convert the checkpoint again") from error

    def native_config(self, dtype: str, stop_ids: tuple[int, ...], pad_id: int) -> dict:
        """config.json of GlmForCausalLM; dtype as torch spells it, `float16`."""
        return {
            "architectures": ["GlmForCausalLM"],
            "model_type": "glm",
            "attention_bias": True,
            "attention_dropout": 0.0,
            "dtype": dtype,
            "eos_token_id": list(stop_ids),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "max_position_embeddings": self.window,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.groups,
            "pad_token_id": pad_id,
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000 * self.rope_ratio,
                "partial_rotary_factor": 0.5,
            },
            "tie_word_embeddings": False,
            "vocab_size": self.vocabulary,
        }

    def original_config(self, dtype: str) -> dict:
        """config.json as the original code reads it."""
        ratio = {} if self.rope_ratio == 1 else {"rope_ratio": self.rope_ratio}
        return {
            **FIXED,
            **ratio,
            "architectures": ["ChatGLMModel"],
            "auto_map": AUTO_MAP,
            "model_type": "chatglm",
            "apply_query_key_layer_scaling": True,
            "attention_dropout": 0.0,
            "attention_softmax_in_fp32": True,
            "bias_dropout_fusion": True,
            "eos_token_id": 2,
            "ffn_hidden_size": self.ffn,
            "hidden_dropout": 0.0,
            "hidden_size": self.hidden,
            "kv_channels": self.head_dim,
            "layernorm_epsilon": self.norm_eps,
            "multi_query_group_num": self.groups,
            "num_attention_heads": self.heads,
            "num_layers": self.layers,
            "original_rope": True,
            "pad_token_id": 0,
            "padded_vocab_size": self.vocabulary,
            "seq_length": self.window,
            "torch_dtype": dtype,
            "use_cache": True,
            "vocab_size": self.vocabulary,
        }

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of query, key and value inside the fused projection."""
        return self.heads * self.head_dim, self.groups * self.head_dim, self.groups * self.head_dim

    def cache_bytes(self, tokens: int) -> int:
        """Memory that keys and values of so many tokens take, in half precision."""
        return tokens * self.layers * sum(self.qkv_rows[1:]) * 2


@dataclass(frozen=True)
class Entry:
    """One original tensor and the native tensors whose rows, one after another, it holds."""

    original: str
    native: tuple[str, ...]
    rows: tuple[int, ...]  # rows of each native tensor
    columns: tuple[int, ...]  # the further dimensions, () for a vector

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the original tensor."""
        return (sum(self.rows), *self.columns)

    def native_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each native tensor."""
        return {name: (rows, *self.columns) for name, rows in zip(self.native, self.rows, strict=True)}


def tensors(shape: Shape) -> list[Entry]:
    """Every tensor of the model but ROTARY, in the order of the forward pass."""
    hidden = (shape.hidden,)
    entries = [_one("embedding.word_embeddings.weight", "model.embed_tokens.weight", shape.vocabulary, hidden)]
    for number in range(shape.layers):
        old, new = f"encoder.layers.{number}.", f"model.layers.{number}."
        qkv = tuple(f"{new}self_attn.{part}_proj." for part in "qkv")
        fused = f"transformer.{old}self_attention.query_key_value."
        entries += [
            _one(old + "input_layernorm.weight", new + "input_layernorm.weight", shape.hidden),
            Entry(fused + "weight", tuple(name + "weight" for name in qkv), shape.qkv_rows, hidden),
            Entry(fused + "bias", tuple(name + "bias" for name in qkv), shape.qkv_rows, ()),
            _one(
                old + "self_attention.dense.weight", new + "self_attn.o_proj.weight", shape.hidden, (shape.qkv_rows[0],)
            ),
            _one(old + "post_attention_layernorm.weight", new + "post_attention_layernorm.weight", shape.hidden),
            _one(old + "mlp.dense_h_to_4h.weight", new + "mlp.gate_up_proj.weight", 2 * shape.ffn, hidden),
            _one(old + "mlp.dense_4h_to_h.weight", new + "mlp.down_proj.weight", shape.hidden, (shape.ffn,)),
        ]
    return [
        *entries,
        _one("encoder.final_layernorm.weight", "model.norm.weight", shape.hidden),
        _one("output_layer.weight", "lm_head.weight", shape.vocabulary, hidden),
    ]


def stored_in(config: dict, file: Path) -> str | None:
    """How config.json says that the matrices inside the layers are stored: `8bit`, `4bit`, None for whole numbers.

    Raises UserError for a way that this product does not write.
    """
    way = config.get("quantization_config")
    if way is None:
        return None
    if isinstance(way, dict) and way.get("quant_method") == "bitsandbytes":
        if way.get("load_in_8bit"):
            return FOLDER_TYPES["int8"]
        if way.get("load_in_4bit") and way.get("bnb_4bit_quant_type") == "nf4":
            return FOLDER_TYPES["nf4"]
    raise UserError(
        f"{file} names a quantisation that is not read here", f"glm quantize makes {', '.join(FOLDER_TYPES)} folders"
    )


def stored_shapes(shape: Shape, load_in: str | None) -> dict[str, tuple[int, ...]]:
    """Every native tensor with its shape, and in 8 or 4 bits the scales beside each matrix of the layers.

    Left out is what 4 bits keep as text, whose length differs.
    """
    whole = {name: size for entry in tensors(shape) for name, size in entry.native_shapes().items()}
    if load_in is None:
        return whole
    found = {}
    for name, size in whole.items():
        if ".layers." not in name or len(size) == 1:
            found[name] = size
        elif load_in == FOLDER_TYPES["int8"]:
            stem = name.removesuffix("weight")
            found |= {name: size, f"{stem}SCB": size[:1], f"{stem}weight_format": ()}
        else:
            numbers = size[0] * size[1]
            scales = {f"{name}.absmax": (-(-numbers // BLOCK),), f"{name}.quant_map": (16,)}
            found |= {name: (-(-numbers // 2), 1), **scales}
    return found


def _one(original: str, native: str, rows: int, columns: tuple[int, ...] = ()) -> Entry:
    return Entry(f"transformer.{original}", (native,), (rows,), columns)


def _refuse_other_models(config: dict, file: Path) -> None:
    kind = config.get("model_type")
    if kind == "glm":
        raise UserError(f"{file} is a converted checkpoint already", "use it as it is")
    if kind != "chatglm":
        raise UserError(
            f"{file} says model_type {kind!r}, not 'chatglm'", "name a ChatGLM3 checkpoint in its original layout"
        )
    if "inner_hidden_size" in config or "position_encoding_2d" in config:
        raise UserError(f"{file} is the first ChatGLM-6B, another architecture", "use ChatGLM3-6B")
