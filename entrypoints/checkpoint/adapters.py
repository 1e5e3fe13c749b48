"""Adapters tuned on the original layout, made native: PEFT LoRA, and P-Tuning v2 prefixes with or without their MLP.

A native LoRA is a plain PEFT folder for GlmForCausalLM. A native prefix is the finished keys and values: one tensor of
shape (layers * 2, groups, length, head_dim), keys at even and values at odd places, the MLP already applied.
"""

import logging
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from entrypoints.checkpoint.files import refuse_lfs_pointer, safetensors_header, written_beside
from entrypoints.checkpoint.layout import Shape, tensors
from entrypoints.checkpoint.manifest import write_manifest
from entrypoints.checkpoint.native import (
    open_native,
    read_prompt_format,
    save_tensors,
    write_json,
    write_prompt_format,
)
from entrypoints.checkpoint.original import TensorFiles, open_tensors, read_json
from entrypoints.checkpoint.prefix_encoder import encoder_shapes, finished_prefix
from entrypoints.errors import UserError
from entrypoints.prompt import PromptFormat

logger = logging.getLogger(__name__)
CONFIG_FILE = "adapter_config.json"
LORA_FILE = "adapter_model.safetensors"
PREFIX_FILE = "prefix.safetensors"
PREFIX_KEY = "transformer.prefix_encoder."
LORA_KEY = re.compile(r"base_model\.model\.(transformer\..+)\.lora_(A|B)\.weight")


@dataclass(frozen=True)
class Adapter:
    """A checked native adapter; `pre_seq_len` is a prefix's length, None for LoRA."""

    folder: Path
    prompt_format: PromptFormat
    pre_seq_len: int | None = None

    def prefix(self) -> torch.Tensor:
        """Keys and values of a P-Tuning v2 prefix, (layers * 2, groups, pre_seq_len, head_dim)."""
        with safe_open(self.folder / PREFIX_FILE, framework="pt") as stored:
            return stored.get_tensor("prefix")


def is_adapter(folder: Path) -> bool:
    """Does the folder hold an original adapter rather than a whole model?"""
    if (folder / CONFIG_FILE).is_file():
        return True
    config = folder / "config.json"
    return config.is_file() and bool(read_json(config).get("pre_seq_len"))


def convert_adapter(
    source: Path, target: Path, base: Path | None, prompt_format: PromptFormat, overwrite: bool = False
) -> None:
    """Turn an original LoRA or P-Tuning v2 folder into a native adapter.

    base: the converted checkpoint it belongs to; a LoRA needs it, a prefix takes its config.json's numbers otherwise.
    Raises UserError naming what is missing, unknown or of another size.
    """
    if not is_adapter(source):
        raise UserError(f"{source} holds no adapter", f"it needs {CONFIG_FILE}, or config.json with pre_seq_len")
    shape = open_native(base).shape if base else None
    if (source / CONFIG_FILE).is_file():
        if shape is None:
            raise UserError("a LoRA adapter is split by its base model's sizes", "name the converted base: --base DIR")
        name, data, config = _lora(source, shape)
    else:
        name, data, config = _prefix(source, shape or _shape_of_prefix(source / "config.json"))
    with written_beside(target, overwrite) as folder:
        save_tensors(data, folder / name)
        write_json(folder / CONFIG_FILE, config)
        write_prompt_format(folder, prompt_format)
        write_manifest(folder, {"made_by": "glm convert", "source": source.resolve().name})


def open_adapter(folder: Path, base: Shape) -> Adapter:
    """Check a native adapter against its base model's shape.

    Raises UserError when it is unreadable, in the original layout, or made for a model of another size.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder", "name a converted adapter's folder (--adapter, ADAPTER_PATH)")
    config_file = folder / CONFIG_FILE
    if not config_file.is_file():
        raise UserError(f"{folder} holds no {CONFIG_FILE}", "convert the adapter first: glm convert SRC DST --base DIR")
    config = read_json(config_file)
    prompt_format = read_prompt_format(folder)
    if config.get("adapter_type") == "ptuning-v2":
        return Adapter(folder, prompt_format, _checked_prefix_length(folder, config, base))
    if config.get("peft_type") != "LORA":
        raise UserError(f"{config_file} is neither LoRA nor P-Tuning v2", "convert one with glm convert")
    if "query_key_value" in (config.get("target_modules") or ()):
        raise UserError(f"{folder} is in the original layout", f"convert it first: glm convert {folder} DST --base DIR")
    _check_lora(folder, config, base)
    return Adapter(folder, prompt_format)


def merging(adapter: Adapter) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """What makes a base tensor, called with its native name, the tuned one in float32; others are given back as is.

    Raises UserError for a prefix: it has no weights to merge.
    """
    if adapter.pre_seq_len is not None:
        raise UserError(
            f"{adapter.folder} is a P-Tuning v2 prefix: keys and values, no weights to merge",
            "run it beside its converted base model: --adapter",
        )
    halves, scale = lora_halves(adapter)

    def merged(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in halves:
            return tensor
        down, up = halves[name]
        return tensor.float().addmm(up, down, alpha=scale)

    return merged


def lora_halves(adapter: Adapter) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], float]:
    """A (rank, in) and B (out, rank) in float32 by native tensor, and the factor of their product."""
    config, stored = read_json(adapter.folder / CONFIG_FILE), load_file(adapter.folder / LORA_FILE)
    names = {name.partition(".lora_")[0] for name in stored}
    halves = {
        f"{name.removeprefix('base_model.model.')}.weight": tuple(
            stored[f"{name}.lora_{half}.weight"].float() for half in "AB"
        )
        for name in names
    }
    return halves, config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])


def _lora(source: Path, shape: Shape) -> tuple[str, dict[str, torch.Tensor], dict]:
    config = read_json(source / CONFIG_FILE)
    unsupported = [key for key in ("modules_to_save", "rank_pattern", "alpha_pattern", "use_dora") if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unsupported:
        raise UserError(
            f"{source / CONFIG_FILE} is no plain LoRA ({', '.join(unsupported) or config.get('peft_type')})",
            "convert a LoRA without trained biases or further modules",
        )
    entries = {entry.original.removesuffix(".weight"): entry for entry in tensors(shape)}
    data, targets = {}, set()
    for name, tensor in _adapter_tensors(source).items():
        match = LORA_KEY.fullmatch(name.replace(".default.", "."))
        entry = entries.get(match[1]) if match else None
        if entry is None:
            raise UserError(
                f"{source} holds {name}, which the base model has no place for", "is --base the right model?"
            )
        rank = config.get("r")
        expected = (rank, entry.columns[0]) if match[2] == "A" else (entry.shape[0], rank)
        if tuple(tensor.shape) != expected:
            raise UserError(
                f"{source}: {name} is {list(tensor.shape)}, the base model needs {list(expected)}",
                "use the base it was tuned on",
            )
        parts = [tensor.clone() for _ in entry.native] if match[2] == "A" else tensor.split(entry.rows)
        for native, part in zip(entry.native, parts, strict=True):
            module = native.removesuffix(".weight")
            targets.add(module.rpartition(".")[2])
            data[f"base_model.model.{module}.lora_{match[2]}.weight"] = part.contiguous()
    _require_halves(source, data)
    kept = {key: config[key] for key in ("r", "lora_alpha", "lora_dropout", "use_rslora") if key in config}
    plain = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True}
    return LORA_FILE, data, {**plain, **kept, "target_modules": sorted(targets)}


def _adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    for name in (LORA_FILE, "adapter_model.bin"):
        if (folder / name).is_file():
            return TensorFiles(folder, {}).of_file(folder / name)
    raise UserError(f"{folder} holds no {LORA_FILE} or adapter_model.bin", "copy the adapter's weights there")


def _shape_of_prefix(file: Path) -> Shape:
    # the tutorial's scripts quantise the base while they tune: the prefix itself never is
    return Shape.from_original(read_json(file) | {"quantization_bit": 0}, file)


def _prefix(source: Path, shape: Shape) -> tuple[str, dict[str, torch.Tensor], dict]:
    config = read_json(source / "config.json")
    stored = open_tensors(source)
    found = {
        name.removeprefix(PREFIX_KEY): tensor.float()
        for file in {tensor.file for tensor in stored.tensors.values()}
        for name, tensor in stored.of_file(file).items()
        if name.startswith(PREFIX_KEY)
    }
    length, projected = config["pre_seq_len"], bool(config.get("prefix_projection"))
    expected = encoder_shapes(shape, length, projected)
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if shapes != expected:
        raise UserError(
            f"{source} holds a prefix of {shapes}, config.json and the base model say {expected}",
            "pre_seq_len and prefix_projection must be those it was tuned with, and the base its own",
        )
    return PREFIX_FILE, {"prefix": finished_prefix(found, shape)}, prefix_config(length)


def prefix_config(length: int) -> dict:
    """adapter_config.json of a native prefix."""
    return {"adapter_type": "ptuning-v2", "pre_seq_len": length}


def _checked_prefix_length(folder: Path, config: dict, base: Shape) -> int:
    file = folder / PREFIX_FILE
    if not file.is_file():
        raise UserError(f"{folder} holds no {PREFIX_FILE}", "convert the adapter again")
    entry = safetensors_header(file).get("prefix")
    expected = [base.layers * 2, base.groups, config.get("pre_seq_len"), base.head_dim]
    if entry is None or entry["shape"] != expected:
        raise UserError(
            f"{file} holds a prefix of {entry and entry['shape']}, {CONFIG_FILE} and the base model need {expected}",
            "use the base model it was tuned on, and the pre_seq_len it was tuned with",
        )
    return config["pre_seq_len"]


def _check_lora(folder: Path, config: dict, base: Shape) -> None:
    file = folder / LORA_FILE
    if not file.is_file():
        raise UserError(f"{folder} holds no {LORA_FILE}", "copy or convert the adapter again")
    refuse_lfs_pointer(file)
    modules = {
        name.removesuffix(".weight"): size
        for entry in tensors(base)
        for name, size in entry.native_shapes().items()
        if len(size) == 2
    }
    header = safetensors_header(file)
    _require_halves(folder, header)
    for name, entry in header.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)\.weight", name)
        rows, columns = modules.get(match[1], (None, None)) if match else (None, None)
        expected = [config.get("r"), columns] if match and match[2] == "A" else [rows, config.get("r")]
        if entry["shape"] != expected:
            raise UserError(
                f"{file}: {name} is {entry['shape']}, the base model needs {expected}",
                "use the base model it was tuned on",
            )


def _require_halves(folder: Path, names: Collection[str]) -> None:
    """PEFT would make up the half that is missing, and only warn."""
    halves = [{name.partition(f".lora_{half}.")[0] for name in names if f".lora_{half}." in name} for half in "AB"]
    alone = sorted(halves[0] ^ halves[1])
    if alone or not halves[0]:
        found = f"only half a LoRA of {', '.join(alone[:4])}" if alone else "no LoRA tensors"
        raise UserError(f"{folder} holds {found}", "copy the adapter's weights again")
