"""Values in config.json other than dimensions: fixed by the architecture, or passed to transformers and vLLM."""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entrypoints.checkpoint.config_numbers import Range, read_number
from entrypoints.errors import UserError

NATIVE_ARCHITECTURE = {
    "architectures": ["GlmForCausalLM"],
    "attention_bias": True,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
NATIVE_ROPE: dict[str, Any] = {"rope_type": "default", "partial_rotary_factor": 0.5}
LINEAR_ROPE = "linear"  # the type that divides positions by a factor
# Not written by this package; each engine would act on them in its own way.
UNSUPPORTED_DEFAULTS = {
    "layer_types": None,
    "mlp_bias": False,
    "partial_rotary_factor": 0.5,
    "rope_scaling": None,
    "sliding_window": None,
}
DTYPES = ("float32", "bfloat16", "float16")
DROPOUT = Range(0.0, 1.0)
MAX_TOKEN_IDS = 64


def check_fixed_values(config: Mapping[str, Any], expected: Mapping[str, Any], file: Path, remedy: str) -> None:
    """Raises UserError naming every value that differs from the expected one; a missing key is accepted."""
    wrong = [
        f"{key}={config[key]!r:.80}"
        for key, value in expected.items()
        if key in config and (type(config[key]), config[key]) != (type(value), value)
    ]
    if wrong:
        raise UserError(f"{file} has {', '.join(wrong)}", remedy)


def check_native_values(config: Mapping[str, Any], vocab_size: int, file: Path) -> None:
    """Raises UserError: a native config.json describes another architecture, or has a value that cannot be loaded."""
    remedy = "use the config.json that glm convert wrote"
    check_fixed_values(config, NATIVE_ARCHITECTURE | UNSUPPORTED_DEFAULTS, file, remedy)
    rope = {f"rope_parameters.{key}": value for key, value in config["rope_parameters"].items() if key != "rope_theta"}
    expected = NATIVE_ROPE
    if rope.get("rope_parameters.rope_type") == LINEAR_ROPE:
        expected = NATIVE_ROPE | {"rope_type": LINEAR_ROPE, "factor": rope.get("rope_parameters.factor")}
    fixed = {key: expected.get(key.partition(".")[2]) for key in rope}  # None: a value that has no effect
    check_fixed_values(rope, fixed, file, remedy)
    for key in ("dtype", "torch_dtype"):
        if config.get(key) is not None and config[key] not in DTYPES:
            raise UserError(f"{file}: {key} is {config[key]!r:.80}", f"supported are {', '.join(DTYPES)}")
    if config.get("attention_dropout") is not None:
        read_number(config, "attention_dropout", DROPOUT, file)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        read_token_ids(config, key, vocab_size, file)


def read_token_ids(config: Mapping[str, Any], key: str, vocab_size: int, file: Path) -> list[int]:
    """The id or ids `config[key]`, none if it is missing. Raises UserError: they are not ids of the vocabulary."""
    value = config.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if len(ids) > MAX_TOKEN_IDS or any(type(number) is not int or not 0 <= number < vocab_size for number in ids):
        raise UserError(
            f"{file}: {key} is {reprlib.repr(value)}, not an id from 0 to {vocab_size - 1} or a list of them",
            "use the file of the model's repository",
        )
    return ids
