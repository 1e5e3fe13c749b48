"""Export a checkpoint as a plain model folder: cast, gathered from ZeRO shards, or with a LoRA merged into its base."""

import contextlib
import logging
import math
import os
import pickle
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from entrypoints.checkpoint.adapter_config import CONFIG_FILE
from entrypoints.checkpoint.adapters import holds_only_adapters, open_adapter
from entrypoints.checkpoint.atomic_files import atomic_folder, check_new_folder, require_disk_space
from entrypoints.checkpoint.conversion import SHARD_BYTES, convert_to_original, output_bytes, write_native_folder
from entrypoints.checkpoint.layout import tensor_mappings
from entrypoints.checkpoint.lora import merge_function
from entrypoints.checkpoint.manifest import MANIFEST_FILE, check_base_weights, read_manifest, sha256, write_manifest
from entrypoints.checkpoint.native import NativeCheckpoint, open_native
from entrypoints.checkpoint.pickle_files import format_load_error, restricted_unpickling
from entrypoints.checkpoint.prompt_file import PROMPT_FILE, read_prompt_format
from entrypoints.checkpoint.tensor_files import TensorInfo, WeightFiles, open_weight_files
from entrypoints.checkpoint.tokenizer import VOCABULARY_FILE
from entrypoints.errors import UserError
from entrypoints.quantization.layerwise_forward import FLOAT32_BYTES, require_layer_memory
from entrypoints.quantization.merge_check import require_equal_logits, require_equal_merge
from entrypoints.training.checkpoints.folders import best_checkpoint, list_checkpoints
from entrypoints.training.checkpoints.store import check_state_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportOptions:
    """base: model that a LoRA is merged into; it also supplies configuration and tokenizer that ZeRO shards lack.

    dtype: `auto` writes float32 as bfloat16, other dtypes unchanged, and a merged LoRA in the dtype of its base.
    """

    base: Path | None = None
    dtype: str = "auto"  # auto | keep | float16 | bfloat16 | float32
    overwrite: bool = False


@dataclass(frozen=True)
class _Target:
    """The folder to write, and its layout."""

    folder: Path
    layout: str  # native | original

    def check(self, checkpoint: NativeCheckpoint, size: int) -> None:
        """Raise UserError for what would otherwise fail after the weights are written; size: of the weights."""
        copies = 1
        if self.layout == "original":  # it is converted from a native folder beside it
            copies = 2
            if not (checkpoint.folder / VOCABULARY_FILE).is_file():
                raise UserError(
                    f"{checkpoint.folder} contains no {VOCABULARY_FILE}", "copy it there from the original checkpoint"
                )
        require_disk_space(self.folder, copies * size)


def export(source: Path, target: Path, options: ExportOptions, layout: str = "native") -> None:
    """Write `source`, a checkpoint, a result or a LoRA of `glm train`, as a plain model folder `target`, atomically.

    layout: native or original. Raises UserError: `source` is incomplete or `target`, memory or disk do not suffice, or
    the merged model's logits differ from those of base and LoRA. All of this is checked before anything is written.
    """
    if source.resolve() == target.resolve():
        raise UserError(f"{source} is both the source and the target", "write to another folder")
    check_new_folder(target, options.overwrite)
    if layout == "native":
        _export_native(source, target, options, _Target(target, layout))
        return
    native_folder = target.with_name(f".{target.name}.native")
    try:
        _export_native(source, native_folder, replace(options, overwrite=True), _Target(target, layout))
        convert_to_original(native_folder, target, "keep", options.overwrite)
    finally:
        shutil.rmtree(native_folder, ignore_errors=True)


def _export_native(source: Path, folder: Path, options: ExportOptions, target: _Target) -> None:
    if (source / CONFIG_FILE).is_file() or holds_only_adapters(source):
        _export_lora(source, folder, options, target)
        return
    checkpoint, weights = _open_complete_model(source, options, target)
    with atomic_folder(folder, options.overwrite) as partial:
        write_native_folder(checkpoint, weights, partial, _written_dtype(weights, options))
        _write_manifest(partial, source)


def _open_complete_model(source: Path, options: ExportOptions, target: _Target) -> tuple[NativeCheckpoint, WeightFiles]:
    """Configuration and weights of a complete model: from its own files, or gathered from ZeRO shards."""
    base = options.base
    if not source.is_dir():
        raise UserError(f"folder not found: {source}", "name a checkpoint-N, or the result of glm train")
    has_weights = any(source.glob("model*.safetensors"))
    if has_weights and (base is None or (source / "config.json").is_file()):
        checkpoint = open_native(source)
        target.check(checkpoint, output_bytes(checkpoint.files, _written_dtype(checkpoint.files, options)))
        return checkpoint, checkpoint.files
    if not has_weights and not (source / "latest").is_file():
        raise UserError(f"{source} has neither model*.safetensors nor ZeRO shards", _name_checkpoints(source))
    if base is None:
        raise UserError(f"{source} has ZeRO shards without config.json", "name the base model: --base DIR")
    base_model = open_native(base)
    has_format = (source / PROMPT_FILE).is_file()
    prompt_format = read_prompt_format(source) if has_format else base_model.prompt_format
    shapes = {
        name: shape
        for mapping in tensor_mappings(base_model.model_config)
        for name, shape in mapping.native_shapes().items()
    }
    if not has_weights:
        target.check(base_model, _gathered_bytes(shapes, options.dtype))
    weights = open_weight_files(source) if has_weights else _gather_zero_shards(source)
    weights.check_shapes(shapes)
    target.check(base_model, output_bytes(weights, _written_dtype(weights, options)))
    return replace(base_model, prompt_format=prompt_format), weights


def _written_dtype(weights: WeightFiles, options: ExportOptions) -> str:
    if options.dtype != "auto":
        return options.dtype
    return "bfloat16" if _stored_dtype(weights) == torch.float32 else "keep"


def _gathered_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> int:
    """Size of gathered ZeRO shards, which are in float32, as they are written."""
    return sum(map(math.prod, shapes.values())) * (4 if dtype in ("keep", "float32") else 2)


def _name_checkpoints(output: Path) -> str:
    """The remedy for the output folder of a run that has no result yet."""
    complete = list_checkpoints(output)
    best = best_checkpoint(complete)
    names = [f"{one.folder.name}{' (lowest validation loss)' if one == best else ''}" for one in complete]
    return f"name a checkpoint in it: {', '.join(names)}" if names else "name a checkpoint-N"


@dataclass(frozen=True)
class _LoadedWeights(WeightFiles):
    """Tensors in memory with the interface of weight files."""

    loaded: dict[str, torch.Tensor]

    def load_file(self, file: Path) -> dict[str, torch.Tensor]:
        """All tensors: they have the same file."""
        return self.loaded


def _gather_zero_shards(source: Path) -> WeightFiles:
    check_state_files(source)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns otherwise
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    logger.info("gathering the ZeRO shards of %s in float32: it takes 4 bytes of host memory per parameter", source)
    try:
        with contextlib.redirect_stdout(sys.stderr), restricted_unpickling():  # DeepSpeed prints
            loaded = get_fp32_state_dict_from_zero_checkpoint(str(source))
    except (ValueError, OSError, AssertionError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"the ZeRO shards of {source} are incomplete or damaged ({format_load_error(error)})",
            "copy all of global_stepN",
        ) from error
    infos = {name: TensorInfo(source / "latest", tuple(tensor.shape), tensor.dtype) for name, tensor in loaded.items()}
    return _LoadedWeights(source, infos, loaded)


def _export_lora(source: Path, folder: Path, options: ExportOptions, target: _Target) -> None:
    if options.base is None:
        raise UserError(f"{source} is an adapter", "name the model it was trained on: --base DIR")
    checkpoint = open_native(options.base)
    adapter = open_adapter(source, checkpoint.model_config)
    factors = adapter.lora_factors()
    check_base_weights(source, options.base)
    dtype = "keep" if options.dtype == "auto" else options.dtype
    target.check(checkpoint, output_bytes(checkpoint.files, dtype))
    largest = max(len(factor.up) * factor.down.shape[1] for factor in factors.values())
    require_layer_memory(checkpoint, f"merging {source}", adapter, minimum=SHARD_BYTES + FLOAT32_BYTES * largest)
    stored_dtype = _stored_dtype(checkpoint.files) if dtype == "keep" else getattr(torch, dtype)
    logits = require_equal_merge(checkpoint, adapter, stored_dtype)
    merged = replace(checkpoint, prompt_format=adapter.prompt_format)
    with atomic_folder(folder, options.overwrite) as partial:
        write_native_folder(merged, checkpoint.files, partial, dtype, merge_function(factors))
        _write_manifest(partial, source)
        require_equal_logits(open_native(partial), checkpoint, adapter, logits)


def _stored_dtype(weights: WeightFiles) -> torch.dtype:
    return next(iter(weights.tensors.values())).dtype


def _write_manifest(folder: Path, source: Path) -> None:
    provenance: dict[str, Any] = {}
    if (source / MANIFEST_FILE).is_file():
        provenance = {**read_manifest(source)["provenance"], "source_manifest": sha256(source / MANIFEST_FILE)}
    write_manifest(folder, {**provenance, "made_by": "glm export", "source": source.resolve().name})
    open_native(folder)
