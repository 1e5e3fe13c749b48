"""From a run's checkpoint to a plain model folder: cast, gathered from ZeRO's shards, or a LoRA merged in."""

import contextlib
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from entrypoints.checkpoint import native
from entrypoints.checkpoint.adapters import CONFIG_FILE, merging, open_adapter
from entrypoints.checkpoint.conversion import write_native
from entrypoints.checkpoint.files import written_beside
from entrypoints.checkpoint.layout import tensors
from entrypoints.checkpoint.manifest import MANIFEST_FILE, read_manifest, refuse_other_base, write_manifest
from entrypoints.checkpoint.native import NativeCheckpoint, open_native
from entrypoints.checkpoint.original import StoredTensor, TensorFiles, open_tensors
from entrypoints.engines.transformers_engine import TransformersEngine
from entrypoints.errors import UserError
from entrypoints.prompt import Message

logger = logging.getLogger(__name__)
QUESTION = [Message("user", "类型#裙*颜色#蓝色，写一段文案")]  # what the merged model and its parts are both asked
# Most that the logits may differ, as a share of the largest: sums of products in another order, and weights rounded
# once more. A LoRA merged with a wrong sign or scale is off by its whole effect.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def export(source: Path, target: Path, base: Path | None = None, dtype: str = "auto", overwrite: bool = False) -> None:
    """Write `source`, a checkpoint, a result or a LoRA of `glm train`, as a plain native folder at `target`.

    base: whom a LoRA is merged into; it also lends what weights or ZeRO shards alone lack. dtype: `auto` writes
    float32 as bfloat16 and everything else as it is, a LoRA as its base.
    Raises UserError naming what is missing, and when the merged model does not answer as base and LoRA do.
    """
    if (source / CONFIG_FILE).is_file():
        _export_lora(source, target, base, dtype, overwrite)
        return
    checkpoint, stored = _whole(source, base)
    if dtype == "auto":
        single = next(iter(stored.tensors.values())).dtype == torch.float32
        dtype = "bfloat16" if single else "keep"
    with written_beside(target, overwrite) as folder:
        write_native(checkpoint, stored, folder, dtype)
        _describe(folder, source)


def _whole(source: Path, base: Path | None) -> tuple[NativeCheckpoint, TensorFiles]:
    """A whole model's settings and tensors: from its own files, or gathered from ZeRO's."""
    if not source.is_dir():
        raise UserError(f"{source} is no folder", "name a checkpoint-N, or the result of glm train")
    whole = any(source.glob("model*.safetensors"))
    if whole and (base is None or (source / "config.json").is_file()):
        checkpoint = open_native(source)
        return checkpoint, checkpoint.files
    if not whole and not (source / "latest").is_file():
        raise UserError(f"{source} holds neither model*.safetensors nor ZeRO shards", "name a checkpoint-N")
    if base is None:
        raise UserError(f"{source} holds ZeRO shards alone", "name the base model for its settings: --base DIR")
    lender = open_native(base)
    own = native.read_prompt_format(source) if (source / native.PROMPT_FILE).is_file() else lender.prompt_format
    stored = open_tensors(source) if whole else _gathered(source)
    stored.check({name: size for entry in tensors(lender.shape) for name, size in entry.native_shapes().items()})
    return replace(lender, prompt_format=own), stored


class _InMemory(TensorFiles):
    """Tensors that are loaded already, as if they lay in one file."""

    def __init__(self, folder: Path, loaded: dict[str, torch.Tensor]) -> None:
        entries = {
            name: StoredTensor(folder / "latest", tuple(tensor.shape), tensor.dtype) for name, tensor in loaded.items()
        }
        super().__init__(folder, entries)
        object.__setattr__(self, "loaded", loaded)

    def of_file(self, file: Path) -> dict[str, torch.Tensor]:
        return self.loaded


def _gathered(source: Path) -> TensorFiles:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it warns otherwise
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    logger.info("gathering the shards of %s in float32: it takes 4 bytes a number of host memory", source)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints
            return _InMemory(source, get_fp32_state_dict_from_zero_checkpoint(str(source)))
    except (ValueError, OSError, AssertionError, KeyError, RuntimeError) as error:
        raise UserError(f"the shards of {source} do not make a model ({error})", "copy all of global_stepN") from error


def _export_lora(source: Path, target: Path, base: Path | None, dtype: str, overwrite: bool) -> None:
    if base is None:
        raise UserError(f"{source} is an adapter", "name the model it was tuned on: --base DIR")
    checkpoint = open_native(base)
    adapter = open_adapter(source, checkpoint.shape)
    merged = merging(adapter)
    refuse_other_base(source, base)
    checkpoint = replace(checkpoint, prompt_format=adapter.prompt_format)
    with written_beside(target, overwrite) as folder:
        write_native(checkpoint, checkpoint.files, folder, "keep" if dtype == "auto" else dtype, merged)
        _describe(folder, source)
        _compare(base, source, folder)


@torch.inference_mode()
def _compare(base: Path, adapter: Path, merged: Path) -> None:
    """One after the other, so that only one model is in memory."""
    stored = next(iter(open_native(merged).files.tensors.values())).dtype
    logits = []
    for folder, beside in ((base, adapter), (merged, None)):
        engine = TransformersEngine.load(folder, beside, device="cpu", dtype="float32")
        ids = torch.tensor([engine.prompt_format.encode(QUESTION, engine.tokenizer)])
        logits.append(engine.model(input_ids=ids).logits[0])
        del engine
    apart = ((logits[0] - logits[1]).abs().max() / logits[0].abs().max()).item()
    logger.info("logits of the merged model and of base and LoRA: %.1e apart, of the largest", apart)
    if not apart <= TOLERANCE[stored]:
        raise UserError(
            f"the merged model's logits are {apart:.1e} off those of base and LoRA",
            "write it with --dtype float32, or serve the LoRA beside its base with --adapter",
        )


def _describe(folder: Path, source: Path) -> None:
    origin = read_manifest(source)["provenance"] if (source / MANIFEST_FILE).is_file() else {}
    write_manifest(folder, {**origin, "made_by": "glm export", "source": source.resolve().name})
    open_native(folder)
