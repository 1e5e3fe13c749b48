"""Ranges of the numbers in config.json, GGUF metadata and adapter_config.json, checked before anything is allocated."""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from entrypoints.errors import UserError

MAX_NUMBER = 10**9  # of any other number in config.json; transformers allocates by some of them, such as num_labels
MAX_LABELS = 1000


class Range(NamedTuple):
    """Both limits are allowed; integers only if the minimum is an integer."""

    minimum: float
    maximum: float


MODEL_RANGES = {  # by field of ModelConfig; several times the largest models of any family
    "num_layers": Range(1, 1024),
    "hidden_size": Range(1, 131_072),
    "num_heads": Range(1, 1024),
    "num_kv_heads": Range(1, 1024),
    "head_dim": Range(1, 1024),
    "intermediate_size": Range(1, 1_048_576),
    "vocab_size": Range(1, 4_194_304),
    "context_length": Range(1, 16_777_216),
    "rms_norm_eps": Range(1e-12, 0.1),
    "rope_ratio": Range(0.01, 1e5),
    "position_divisor": Range(0.01, 1e5),
    "rope_theta": Range(100.0, 1e9),  # 10000 * rope_ratio
}


def read_number(values: Mapping[str, Any], key: str, limits: Range, file: Path) -> Any:
    """The number `values[key]`. Raises UserError: it is of another type or out of range, KeyError: it is missing."""
    value = values[key]
    types = int if isinstance(limits.minimum, int) else (int, float)
    is_number = isinstance(value, types) and not isinstance(value, bool)
    if not (is_number and limits.minimum <= value <= limits.maximum):  # false for NaN
        kind = "an integer" if types is int else "a number"
        raise UserError(
            f"{file}: {key} is {reprlib.repr(value)}, not {kind} from {limits.minimum:g} to {limits.maximum:.10g}",
            "use the file of the model's repository",
        )
    return value


def read_model_numbers(values: Mapping[str, Any], keys: Mapping[str, str], file: Path) -> dict[str, Any]:
    """The fields of ModelConfig. keys: field -> key in `values`; `rope_theta` may replace `rope_ratio`.

    Raises UserError: a number is of another type or out of range, KeyError: it is missing.
    """
    numbers = {field: read_number(values, key, MODEL_RANGES[field], file) for field, key in keys.items()}
    if numbers["num_heads"] % numbers["num_kv_heads"]:
        raise UserError(
            f"{file}: {keys['num_kv_heads']} is {numbers['num_kv_heads']}, which does not divide "
            f"{keys['num_heads']} {numbers['num_heads']}",
            "use the file of the model's repository",
        )
    if "rope_theta" in numbers:
        numbers["rope_ratio"] = numbers.pop("rope_theta") / 10000
    return numbers


def check_other_numbers(config: Mapping[str, Any], file: Path) -> None:
    """Raises UserError: a number anywhere in config.json is not finite or larger than MAX_NUMBER."""
    pending: list[tuple[str, Any]] = list(config.items())
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{key}.{name}", item) for name, item in value.items()]
        elif isinstance(value, list):
            pending += [(key, item) for item in value]
        elif isinstance(value, int | float):
            limit = MAX_LABELS if key == "num_labels" else MAX_NUMBER
            if not -limit <= value <= limit:  # true for NaN
                raise UserError(
                    f"{file}: {key} is {reprlib.repr(value)}, not a number from -{limit} to {limit}",
                    "use the file of the model's repository",
                )
