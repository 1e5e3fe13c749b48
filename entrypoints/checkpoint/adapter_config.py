"""adapter_config.json: every field is applied, known not to change the answers, or refused by its name.

PEFT acts on many fields. A field that is read by one part of this package and not by another would give different
answers, so a field that no list below names is refused unless it is empty.
"""

import re
import reprlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entrypoints.checkpoint.config_numbers import Range, read_number
from entrypoints.errors import UserError

CONFIG_FILE = "adapter_config.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-([0-9]{1,18})")  # of a folder in which training saves a step
APPLIED_FIELDS = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules")
# Used in training only, or a choice of modules, which the names of the stored tensors repeat.
NEUTRAL_FIELDS = (
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config"),
    *("inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config"),
    *("megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"),
    *("lora_dtype", "lorap_emb_lr", "lorap_lr_ratio"),  # of ms-swift
)
PLAIN_VALUES = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica")}
MERGE_REMEDY = "merge it into its base with PEFT's merge_and_unload, and use the merged model"
CONVERT_REMEDY = "save it with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA"
RANK = Range(1, 16_384)
ALPHA = Range(0.0, 1e6)
DROPOUT = Range(0.0, 1.0)
PREFIX_LENGTH = Range(1, 65_536)


@dataclass(frozen=True)
class LoraSettings:
    """Rank and scale of each module; a pattern maps the end of a module's name to its own value."""

    rank: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """The rank of a module's factors."""
        return next((value for key, value in self.rank_pattern.items() if _matches(key, module)), self.rank)

    def alpha_of(self, module: str) -> float:
        """The alpha of a module; the first matching key counts, as in PEFT."""
        return next((value for key, value in self.alpha_pattern.items() if _matches(key, module)), self.alpha)

    def scale_of(self, module: str) -> float:
        """The factor of the product of both factors."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (rank**0.5 if self.use_rslora else rank)

    def config_fields(self) -> dict[str, Any]:
        """The fields of adapter_config.json, which are those of PEFT's LoraConfig."""
        patterns = {"rank_pattern": dict(self.rank_pattern), "alpha_pattern": dict(self.alpha_pattern)}
        numbers = {"r": self.rank, "lora_alpha": self.alpha, "use_rslora": self.use_rslora}
        return {**numbers, **{name: pattern for name, pattern in patterns.items() if pattern}}


def read_lora_settings(config: dict[str, Any], modules: Collection[str], file: Path) -> LoraSettings:
    """The settings of a LoRA. modules: names of the weight matrices of the base model, in the layout of the adapter.

    Raises UserError naming a field that is not supported, or a value of a wrong type or size.
    """
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{file}: peft_type {config.get('peft_type')} is not supported",
            "tune a LoRA, or a P-Tuning v2 prefix with glm train --method ptuning",
        )
    _check_fields(config, file)
    try:
        numbers = read_number(config, "r", RANK, file), read_number(config, "lora_alpha", ALPHA, file)
    except KeyError as error:
        raise UserError(f"{file} lacks {error}", "copy the adapter again") from error
    read_number({"lora_dropout": 0.0, **config}, "lora_dropout", DROPOUT, file)
    use_rslora = config.get("use_rslora") or False
    if not isinstance(use_rslora, bool):
        raise UserError(f"{file}: use_rslora is not true or false", "copy the adapter again")
    patterns = [
        _read_pattern(config, *limits, modules, file) for limits in (("rank_pattern", RANK), ("alpha_pattern", ALPHA))
    ]
    return LoraSettings(*numbers, use_rslora, *patterns)


def check_target_modules(
    config: dict[str, Any], adapted: Collection[str], modules: Collection[str], file: Path
) -> None:
    """Raises UserError unless target_modules is a list of names of `modules` or of their ends that covers `adapted`.

    adapted: modules with stored tensors. PEFT takes a string as a regular expression, which can be one that never
    ends, and ignores the tensors of other modules.
    """
    targets, known = config.get("target_modules"), set(_name_ends(modules))
    if not (isinstance(targets, list) and targets and all(isinstance(name, str) and name in known for name in targets)):
        names = sorted({name.rpartition(".")[2] for name in modules})
        raise UserError(
            f"{file}: target_modules is {reprlib.repr(targets)}, not a list of module names",
            f"list the modules that the adapter changes, out of {', '.join(names)}",
        )
    ignored = [name for name in adapted if not any(_matches(target, name) for target in targets)]
    if ignored:
        raise UserError(
            f"{file}: target_modules does not name {ignored[0]}, of which the adapter has tensors",
            "list the modules that the adapter changes",
        )


def prefix_length(config: dict[str, Any], file: Path) -> int:
    """pre_seq_len of a P-Tuning v2 prefix. Raises UserError: it is missing or out of range."""
    length: int = read_number({"pre_seq_len": None, **config}, "pre_seq_len", PREFIX_LENGTH, file)
    return length


def _check_fields(config: dict[str, Any], file: Path) -> None:
    for name, value in config.items():
        if value and name not in (*APPLIED_FIELDS, *NEUTRAL_FIELDS) and value not in PLAIN_VALUES.get(name, ()):
            raise UserError(
                f"{file}: {name} {reprlib.repr(value)} is not supported",
                CONVERT_REMEDY if name == "init_lora_weights" else MERGE_REMEDY,
            )


def _read_pattern(
    config: dict[str, Any], name: str, limits: Range, modules: Collection[str], file: Path
) -> dict[str, Any]:
    """A pattern whose keys are names of modules or their ends; PEFT takes them as regular expressions."""
    pattern = config.get(name) or {}
    if not isinstance(pattern, dict):
        raise UserError(f"{file}: {name} is {reprlib.repr(pattern)}, not an object", "copy the adapter again")
    ends = set(_name_ends(modules))
    for key in pattern:
        if key not in ends and not (key.startswith("^") and key[1:] in modules):
            raise UserError(
                f"{file}: {name} has the key {reprlib.repr(key)}, which is not a module of the base model",
                "name each module in full, as in the names of the tensors",
            )
        read_number(pattern, key, limits, file)
    _check_unambiguous(pattern, modules, f"{file}: {name}")
    return pattern


def _check_unambiguous(pattern: Mapping[str, Any], modules: Collection[str], subject: str) -> None:
    """PEFT takes the first key that matches, but sorts the keys when it saves them."""
    for module in modules:
        keys = [key for key in pattern if _matches(key, module)]
        if len({pattern[key] for key in keys}) > 1:
            raise UserError(
                f"{subject} has different values for {module}: {', '.join(keys)}",
                "name each module in full, with the value that it was tuned with",
            )


def _name_ends(modules: Collection[str]) -> Iterator[str]:
    """Each name, and each of its ends after a dot."""
    for module in modules:
        parts = module.split(".")
        yield from (".".join(parts[start:]) for start in range(len(parts)))


def _matches(key: str, module: str) -> bool:
    return module in (key, key.removeprefix("^")) or module.endswith(f".{key}")
