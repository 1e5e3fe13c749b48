"""config.json of the original layout: its keys, its fixed values, and writing it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrypoints.checkpoint.config_numbers import check_other_numbers
from entrypoints.checkpoint.config_values import check_fixed_values
from entrypoints.errors import UserError
from entrypoints.families import Family

if TYPE_CHECKING:
    from entrypoints.checkpoint.layout import ModelConfig
    from entrypoints.checkpoint.tokenizer import Tokenizer

AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
}
# Fixed by the architecture: an original config with another value describes another model.
REQUIRED_CONFIG = {
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "multi_query_attention": True,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
    "tie_word_embeddings": False,
}
VOCABULARY_ROWS = 65024
ORIGINAL_DEFAULTS = {"padded_vocab_size": VOCABULARY_ROWS, "rope_ratio": 1}
ORIGINAL_KEYS = {  # field of ModelConfig -> key in the original config.json
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "multi_query_group_num",
    "head_dim": "kv_channels",
    "intermediate_size": "ffn_hidden_size",
    "vocab_size": "padded_vocab_size",
    "context_length": "seq_length",
    "rms_norm_eps": "layernorm_epsilon",
    "rope_ratio": "rope_ratio",
}


def check_original_values(config: dict[str, Any], file: Path) -> None:
    """Raises UserError: an original config.json has a fixed value or a number of another model."""
    _check_model_type(config, file)
    fixed = REQUIRED_CONFIG | ({"quantization_bit": 0} if config.get("quantization_bit") else {})
    check_fixed_values(config, fixed, file, "convert an unquantized ChatGLM3 checkpoint")
    check_other_numbers(config, file)


def _check_model_type(config: dict[str, Any], file: Path) -> None:
    kind = config.get("model_type")
    if kind == "glm":
        raise UserError(f"{file} belongs to a checkpoint that is already converted", "use it as it is")
    if kind != "chatglm":
        raise UserError(
            f"{file} has model_type {kind!r}, not 'chatglm'",
            "give the path of a ChatGLM3 checkpoint in the original layout",
        )
    if "inner_hidden_size" in config or "position_encoding_2d" in config:
        raise UserError(f"{file} belongs to the first ChatGLM-6B, which has another architecture", "use ChatGLM3-6B")


def original_token_ids(family: Family, tokenizer: "Tokenizer") -> dict[str, Any]:
    """Ids of config.json and generation_config.json: one end id, or all stop ids of a family that names them there."""
    stops = list(tokenizer.stop_ids) if family.stops_in_config else tokenizer.eos_id
    return {"eos_token_id": stops, "pad_token_id": tokenizer.pad_id}


def original_config(model_config: "ModelConfig", dtype: str, family: Family) -> dict[str, Any]:
    """config.json of the original layout; the name in it tells this family from others with equal configurations."""
    scale = model_config.rope_ratio if family.rope_ratio_scales == "base" else model_config.position_divisor
    ratio = {} if scale == 1 else {"rope_ratio": scale}
    return {
        **REQUIRED_CONFIG,
        **ratio,
        "_name_or_path": family.repository,
        "architectures": ["ChatGLMModel"],
        "auto_map": AUTO_MAP,
        "model_type": "chatglm",
        "apply_query_key_layer_scaling": True,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "eos_token_id": 2,
        "ffn_hidden_size": model_config.intermediate_size,
        "hidden_dropout": 0.0,
        "hidden_size": model_config.hidden_size,
        "kv_channels": model_config.head_dim,
        "layernorm_epsilon": model_config.rms_norm_eps,
        "multi_query_group_num": model_config.num_kv_heads,
        "num_attention_heads": model_config.num_heads,
        "num_layers": model_config.num_layers,
        "pad_token_id": 0,
        "padded_vocab_size": model_config.vocab_size,
        "seq_length": model_config.context_length,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": model_config.vocab_size,
    }
