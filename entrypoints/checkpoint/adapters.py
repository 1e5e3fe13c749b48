"""Adapters: conversion from the original layout (PEFT LoRA, P-Tuning v2 prefixes), validation, and merging of LoRA.

A native LoRA is a plain PEFT folder for GlmForCausalLM. A native prefix contains the computed keys and values, with the
MLP applied: one tensor (num_layers * 2, num_kv_heads, pre_seq_len, head_dim), keys at even, values at odd indices.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.checkpoint.adapter_config import CONFIG_FILE, LoraSettings, prefix_length
from entrypoints.checkpoint.atomic_files import atomic_folder, read_safetensors_header
from entrypoints.checkpoint.family_evidence import identify_family, possible_families
from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.checkpoint.lora import (
    LORA_FILE,
    LoraFactors,
    convert_lora,
    find_adapters,
    load_lora_factors,
    open_lora,
    peft_config_fields,
)
from entrypoints.checkpoint.manifest import write_manifest
from entrypoints.checkpoint.native import (
    open_native,
    save_tensors,
    write_prompt_format,
)
from entrypoints.checkpoint.prefix_encoder import compute_prefix, encoder_shapes
from entrypoints.checkpoint.prompt_file import read_prompt_format
from entrypoints.checkpoint.tensor_files import open_weight_files, read_json
from entrypoints.errors import UserError
from entrypoints.families import DEFAULT_FAMILY, family_named
from entrypoints.file_writing import write_json

logger = logging.getLogger(__name__)
PREFIX_FILE = "prefix.safetensors"
PREFIX_KEY = "transformer.prefix_encoder."


@dataclass(frozen=True)
class Adapter:
    """A validated native adapter: a LoRA with its settings, or a prefix with its length."""

    folder: Path
    prompt_format: PromptFormat
    pre_seq_len: int | None = None
    lora: LoraSettings | None = None

    def prefix(self) -> torch.Tensor:
        """Keys and values of a P-Tuning v2 prefix, (num_layers * 2, num_kv_heads, pre_seq_len, head_dim)."""
        with safe_open(self.folder / PREFIX_FILE, framework="pt") as stored:
            prefix: torch.Tensor = stored.get_tensor("prefix")
        return prefix

    def peft_config(self) -> dict[str, Any]:
        """Arguments of PEFT's LoraConfig. Raises UserError: it is a prefix."""
        return peft_config_fields(self.folder, self._lora_settings())

    def lora_factors(self) -> dict[str, LoraFactors]:
        """The update of each changed weight by native tensor name. Raises UserError: it is a prefix."""
        return load_lora_factors(self.folder, self._lora_settings())

    def _lora_settings(self) -> LoraSettings:
        if self.lora is None:
            raise UserError(
                f"{self.folder} is a P-Tuning v2 prefix, which cannot be merged into weights",
                "load it with its converted base model: --adapter",
            )
        return self.lora


def is_adapter(folder: Path) -> bool:
    """Does the folder contain an original adapter rather than a whole model?"""
    if (folder / CONFIG_FILE).is_file():
        return True
    config = folder / "config.json"
    return config.is_file() and bool(read_json(config).get("pre_seq_len"))


def holds_only_adapters(folder: Path) -> bool:
    """Does the folder contain no model, but subfolders with adapters?"""
    return not (folder / "config.json").is_file() and bool(find_adapters(folder))


def adapter_format(
    source: Path, base: Path | None, family: str | None = None, template: str | None = None
) -> PromptFormat:
    """The prompt format of an original adapter: of the family of its base, of `family`, or that its files name.

    A prefix whose files name no family counts as one of DEFAULT_FAMILY. Raises UserError: they name different ones.
    """
    if base:
        known = read_prompt_format(base).family
        if family not in (None, known):
            raise UserError(f"{base} belongs to the family {known}, not {family}", "omit --family")
        return PromptFormat.of(family_named(known), template)
    config = read_json(source / "config.json") if (source / "config.json").is_file() else {}
    possible = possible_families(source, config)
    if not family and len(possible) > 1 and DEFAULT_FAMILY in possible:
        family = DEFAULT_FAMILY
    return PromptFormat.of(identify_family(source, config, family), template)


def convert_adapter(
    source: Path, target: Path, base: Path | None, prompt_format: PromptFormat, overwrite: bool = False
) -> None:
    """Convert an original LoRA or P-Tuning v2 folder to a native adapter.

    base: the converted base model. Required for a LoRA; a prefix otherwise takes the dimensions of its own config.json.
    Raises UserError naming what is missing, unexpected or of the wrong size.
    """
    if not is_adapter(source):
        raise _no_adapter(source, f"it needs {CONFIG_FILE}, or config.json with pre_seq_len")
    model_config = open_native(base).model_config if base else None
    if (source / CONFIG_FILE).is_file():
        if model_config is None:
            raise UserError(
                "converting a LoRA adapter needs the dimensions of its base model",
                "name the converted base: --base DIR",
            )
        _log_other_adapters(source)
        file_name, (tensors, config) = LORA_FILE, convert_lora(source, model_config)
    else:
        file_name = PREFIX_FILE
        tensors, config = _convert_prefix(source, model_config or _prefix_model_config(source / "config.json"))
    with atomic_folder(target, overwrite) as folder:
        save_tensors(tensors, folder / file_name)
        write_json(folder / CONFIG_FILE, config)
        write_prompt_format(folder, prompt_format)
        write_manifest(folder, {"made_by": "glm convert", "source": source.resolve().name})


def open_adapter(folder: Path, base: ModelConfig) -> Adapter:
    """Validate a native adapter against the dimensions of its base model.

    Raises UserError: it is unreadable, in the original layout, or belongs to a model of another size.
    """
    if not folder.is_dir():
        raise UserError(f"folder not found: {folder}", "give the path of a converted adapter (--adapter, ADAPTER_PATH)")
    config_file = folder / CONFIG_FILE
    if not config_file.is_file():
        raise _no_adapter(folder, "convert the adapter first: glm convert SRC DST --base DIR")
    config = read_json(config_file)
    prompt_format = read_prompt_format(folder)
    if config.get("adapter_type") == "ptuning-v2":
        return Adapter(folder, prompt_format, pre_seq_len=_check_prefix(folder, config, base))
    targets = config.get("target_modules")
    if isinstance(targets, list) and "query_key_value" in targets:
        raise UserError(f"{folder} is in the original layout", f"convert it first: glm convert {folder} DST --base DIR")
    settings = open_lora(folder, config, base)
    _log_other_adapters(folder)
    return Adapter(folder, prompt_format, lora=settings)


def prefix_config(length: int) -> dict[str, Any]:
    """adapter_config.json of a native prefix."""
    return {"adapter_type": "ptuning-v2", "pre_seq_len": length}


def _no_adapter(folder: Path, remedy: str) -> UserError:
    """The error for a folder without an adapter of its own; PEFT saves several adapters in subfolders."""
    names = find_adapters(folder)
    if names:
        return UserError(f"{folder} contains several adapters: {', '.join(names)}", f"name one: {folder / names[0]}")
    return UserError(f"{folder} contains no {CONFIG_FILE}", remedy)


def _log_other_adapters(folder: Path) -> None:
    names = find_adapters(folder)
    if names:
        logger.warning("%s contains further adapters, which are not used: %s", folder, ", ".join(names))


def _prefix_model_config(file: Path) -> ModelConfig:
    # the tutorial's scripts quantize the base during fine-tuning; the prefix itself is never quantized
    return ModelConfig.from_original(read_json(file) | {"quantization_bit": 0}, file)


def _convert_prefix(source: Path, model_config: ModelConfig) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    config = read_json(source / "config.json")
    stored = open_weight_files(source)
    found = {
        name.removeprefix(PREFIX_KEY): tensor.float()
        for file in {tensor.file for tensor in stored.tensors.values()}
        for name, tensor in stored.load_file(file).items()
        if name.startswith(PREFIX_KEY)
    }
    length, projected = prefix_length(config, source / "config.json"), bool(config.get("prefix_projection"))
    expected = encoder_shapes(model_config, length, projected)
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if shapes != expected:
        raise UserError(
            f"{source} contains a prefix of {shapes}, config.json and the base model need {expected}",
            "pre_seq_len, prefix_projection and the base must be those it was tuned with",
        )
    return {"prefix": compute_prefix(found, model_config)}, prefix_config(length)


def _check_prefix(folder: Path, config: dict[str, Any], base: ModelConfig) -> int:
    """The length of a valid prefix."""
    file = folder / PREFIX_FILE
    if not file.is_file():
        raise UserError(f"{folder} contains no {PREFIX_FILE}", "convert the adapter again")
    length = prefix_length(config, folder / CONFIG_FILE)
    entry = read_safetensors_header(file).get("prefix")
    expected = [base.num_layers * 2, base.num_kv_heads, length, base.head_dim]
    if entry is None or entry["shape"] != expected:
        raise UserError(
            f"{file} contains a prefix of {entry and entry['shape']}, {CONFIG_FILE} and the base model need {expected}",
            "use the base it was tuned on, and the pre_seq_len it was tuned with",
        )
    return length
