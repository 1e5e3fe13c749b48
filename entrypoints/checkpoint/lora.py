"""LoRA adapters: conversion from the original layout, validation against the base model, and merging.

A native LoRA is a plain PEFT folder for GlmForCausalLM.
"""

import logging
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from entrypoints.checkpoint.adapter_config import (
    CHECKPOINT_NAME,
    CONFIG_FILE,
    LoraSettings,
    check_target_modules,
    read_lora_settings,
)
from entrypoints.checkpoint.atomic_files import check_not_lfs_pointer, read_safetensors_header
from entrypoints.checkpoint.layout import ModelConfig, tensor_mappings
from entrypoints.checkpoint.tensor_files import WeightFiles, read_json
from entrypoints.errors import UserError

logger = logging.getLogger(__name__)
LORA_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
TENSOR_NAME = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")
ORIGINAL_PREFIX = "base_model.model.transformer."
EMBEDDING = "model.embed_tokens.weight"  # PEFT stores its LoRA in other tensors
MAX_LISTED_NAMES = 4  # tensor names in one error message


class LoraFactors(NamedTuple):
    """The update of a weight is `scale * up @ down`; both factors in float32."""

    down: torch.Tensor  # A, (rank, in_features)
    up: torch.Tensor  # B, (out_features, rank)
    scale: float


def open_lora(folder: Path, config: dict[str, Any], base: ModelConfig) -> LoraSettings:
    """Validate a native LoRA against the dimensions of its base model; reads no tensors.

    Raises UserError naming a field that is not supported, or a tensor that does not fit.
    """
    modules = _weight_matrices(base)
    file = folder / LORA_FILE
    settings = read_lora_settings(config, modules, folder / CONFIG_FILE)
    if not file.is_file():
        remedy = "copy the adapter's weights there"
        if (folder / PICKLED_FILE).is_file():
            remedy = f"save it as safetensors: PEFT's save_pretrained does so, {PICKLED_FILE} is the older format"
        raise UserError(f"{folder} contains no {LORA_FILE}", remedy)
    check_not_lfs_pointer(file)
    header = read_safetensors_header(file)
    _require_both_factors(folder, header)
    for name, entry in header.items():
        match = TENSOR_NAME.fullmatch(name)
        if match is None or match[1] not in modules:
            if name.startswith(ORIGINAL_PREFIX):
                raise UserError(
                    f"{folder} is in the original layout", f"convert it first: glm convert {folder} DST --base DIR"
                )
            raise _unknown_tensor(file, name)
        rank, (rows, columns) = settings.rank_of(match[1]), modules[match[1]]
        expected = [rank, columns] if match[2] == "A" else [rows, rank]
        if entry["shape"] != expected:
            raise UserError(
                f"{file}: {name} is {entry['shape']}, the base model and {CONFIG_FILE} need {expected}",
                "use the base it was tuned on",
            )
    check_target_modules(config, _adapted_modules(header), modules, folder / CONFIG_FILE)
    return settings


def peft_config_fields(folder: Path, settings: LoraSettings) -> dict[str, Any]:
    """Arguments of PEFT's LoraConfig for an adapter that `open_lora` has checked; it never reads the file itself.

    The modules are those with stored tensors, so that PEFT creates no others.
    """
    header = read_safetensors_header(folder / LORA_FILE)
    return {**settings.config_fields(), "task_type": "CAUSAL_LM", "target_modules": _adapted_modules(header)}


def load_lora_factors(folder: Path, settings: LoraSettings) -> dict[str, LoraFactors]:
    """The update of each changed weight by native tensor name."""
    stored = load_file(folder / LORA_FILE)
    return {
        f"{module}.weight": LoraFactors(
            stored[f"base_model.model.{module}.lora_A.weight"].float(),
            stored[f"base_model.model.{module}.lora_B.weight"].float(),
            settings.scale_of(module),
        )
        for module in _adapted_modules(stored)
    }


def merge_function(factors: Mapping[str, LoraFactors]) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """A function (native name, base tensor) -> merged tensor in float32; other tensors are returned unchanged."""

    def merge(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in factors:
            return tensor
        down, up, scale = factors[name]
        return tensor.float().addmm(up, down, alpha=scale)

    return merge


def convert_lora(source: Path, base: ModelConfig) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and adapter_config.json of the native adapter, from one in the original layout.

    A of a fused projection is copied to each of its parts, B is split by rows. Raises UserError.
    """
    config, file = read_json(source / CONFIG_FILE), source / CONFIG_FILE
    mappings = {
        mapping.original.removesuffix(".weight"): mapping
        for mapping in tensor_mappings(base)
        if mapping.columns and mapping.native != (EMBEDDING,)
    }
    settings = read_lora_settings(config, mappings, file)
    stored = {name.replace(".default.", "."): tensor for name, tensor in _stored_tensors(source).items()}
    tensors: dict[str, torch.Tensor] = {}
    native_settings: dict[str, tuple[int, float]] = {}
    for name, tensor in stored.items():
        match = TENSOR_NAME.fullmatch(name)
        if match is None or match[1] not in mappings:
            if match and match[1] in _weight_matrices(base):
                raise UserError(f"{source} is already in the native layout", "use it as it is")
            raise _unknown_tensor(source, name)
        mapping, rank = mappings[match[1]], settings.rank_of(match[1])
        is_down = match[2] == "A"
        expected = (rank, mapping.columns[0]) if is_down else (mapping.shape[0], rank)
        if tuple(tensor.shape) != expected:
            raise UserError(
                f"{source}: {name} is {list(tensor.shape)}, the base model and {CONFIG_FILE} need {list(expected)}",
                "use the base it was tuned on",
            )
        parts = [tensor.clone() for _ in mapping.native] if is_down else torch.split(tensor, list(mapping.rows))
        for native, part in zip(mapping.native, parts, strict=True):
            module = native.removesuffix(".weight")
            tensors[f"base_model.model.{module}.lora_{match[2]}.weight"] = part.contiguous()
            native_settings[module] = rank, settings.alpha_of(match[1])
    _require_both_factors(source, tensors)
    check_target_modules(config, _adapted_modules(stored), mappings, file)
    return tensors, _native_config(config, settings, native_settings)


def find_adapters(folder: Path) -> list[str]:
    """Names of the subfolders with an adapter each, as PEFT saves several of them; checkpoints do not count."""
    files = sorted(folder.glob(f"*/{CONFIG_FILE}"))
    return [file.parent.name for file in files if not CHECKPOINT_NAME.fullmatch(file.parent.name)]


def _native_config(
    config: Mapping[str, Any], settings: LoraSettings, modules: Mapping[str, tuple[int, float]]
) -> dict[str, Any]:
    native = LoraSettings(
        settings.rank,
        settings.alpha,
        settings.use_rslora,
        {name: rank for name, (rank, _) in modules.items() if rank != settings.rank},
        {name: alpha for name, (_, alpha) in modules.items() if alpha != settings.alpha},
    )
    fixed = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True}
    dropout = {"lora_dropout": config["lora_dropout"]} if "lora_dropout" in config else {}
    targets = sorted({name.rpartition(".")[2] for name in modules})
    return {**fixed, **dropout, **native.config_fields(), "target_modules": targets}


def _weight_matrices(base: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Native module name -> shape of its weight."""
    return {
        name.removesuffix(".weight"): shape
        for mapping in tensor_mappings(base)
        for name, shape in mapping.native_shapes().items()
        if len(shape) == 2 and name != EMBEDDING
    }


def _adapted_modules(names: Collection[str]) -> list[str]:
    matches = (TENSOR_NAME.fullmatch(name) for name in names)
    return sorted({match[1] for match in matches if match})


def _stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    for name in (LORA_FILE, PICKLED_FILE):
        if (folder / name).is_file():
            return WeightFiles(folder, {}).load_file(folder / name)
    raise UserError(f"{folder} contains no {LORA_FILE} or {PICKLED_FILE}", "copy the adapter's weights there")


def _unknown_tensor(file: Path, name: str) -> UserError:
    if ".base_layer." in name:
        return UserError(
            f"{file} contains weights of the base model: {name}",
            "save the adapter with save_pretrained(…, save_embedding_layers=False)",
        )
    return UserError(
        f"{file} contains {name}, which is not a LoRA factor of a weight matrix of the base model",
        "use the base it was tuned on; save each adapter of a PEFT model with save_pretrained",
    )


def _require_both_factors(folder: Path, names: Collection[str]) -> None:
    """PEFT would initialize a missing factor and only warn."""
    modules = [
        {name.partition(f".lora_{factor}.")[0] for name in names if f".lora_{factor}." in name} for factor in "AB"
    ]
    incomplete = sorted(modules[0] ^ modules[1])
    if incomplete or not modules[0]:
        listed = ", ".join(incomplete[:MAX_LISTED_NAMES])
        problem = f"only one of the factors lora_A and lora_B of {listed}" if incomplete else "no LoRA tensors"
        raise UserError(f"{folder} contains {problem}", "copy the adapter's weights again")
