"""What each method trains, and what it saves: full, freeze, lora, qlora, ptuning."""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GlmForCausalLM

from entrypoints.checkpoint.adapters import CONFIG_FILE, LORA_FILE, PREFIX_FILE, prefix_config
from entrypoints.checkpoint.layout import Shape
from entrypoints.checkpoint.native import write_json
from entrypoints.checkpoint.prefix_encoder import encoder_shapes, finished_prefix
from entrypoints.engines.placement import in_fewer_bits
from entrypoints.training.arguments import LORA_TARGETS, TrainArguments
from entrypoints.training.labelled import LabelledGlm
from entrypoints.training.prefix import ENCODER, PrefixLearner

ENCODER_FILE = "prefix_encoder.safetensors"  # what a run resumes from; the finished prefix has no way back to it
SHARD_SIZE = "5GB"


def load(arguments: TrainArguments, shape: Shape, compute: torch.dtype, divided: bool = False) -> torch.nn.Module:
    """The base model with what the method trains in it.

    What learns is in float32, also where the pass computes in 16 bits: fp16 gradients cannot be unscaled. What is
    frozen is in `compute`. With `divided` all is: DeepSpeed keeps the float32 of its own.
    """
    method = arguments.method
    dtype = torch.float32 if method == "full" and not divided else compute
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model_name_or_path, dtype=dtype, local_files_only=True, **_quantisation(arguments, compute)
    )
    model.__class__ = LabelledGlm  # the same modules, another loss
    model.smoothing = arguments.label_smoothing
    model.config.use_cache = False  # with one, packed rows would see each other
    if method == "freeze":
        return _last_layers(model, arguments.freeze_layers, compute if divided else torch.float32)
    if method in ("lora", "qlora"):
        return _with_lora(model, arguments)
    if method == "ptuning":
        return PrefixLearner.over(model, shape, arguments.prefix_length, arguments.prefix_projection)
    return model


def save(
    model: torch.nn.Module, state: Mapping[str, torch.Tensor], folder: Path, shape: Shape, dtype: torch.dtype | None
) -> None:
    """Write the result's weights: all of the model in `dtype` (None: as they are), or the adapter in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PrefixLearner):
        encoder = {name.removeprefix(ENCODER): tensor for name, tensor in state.items() if name.startswith(ENCODER)}
        encoder = {name: tensor.detach().float().cpu().contiguous() for name, tensor in encoder.items()}
        save_file(encoder, folder / ENCODER_FILE, metadata={"format": "pt"})
        save_file({"prefix": finished_prefix(encoder, shape)}, folder / PREFIX_FILE, metadata={"format": "pt"})
        write_json(folder / CONFIG_FILE, prefix_config(len(encoder["embedding.weight"])))
        return
    if isinstance(model, GlmForCausalLM):
        state = state if dtype is None else {name: tensor.to(dtype) for name, tensor in state.items()}
        model.save_pretrained(folder, state_dict=state, max_shard_size=SHARD_SIZE)
        return
    _save_lora(model, state, folder)


def load_prefix(model: PrefixLearner, folder: Path) -> None:
    """Put a checkpoint's prefix encoder into the model."""
    model.prefix_encoder.load_state_dict(load_file(folder / ENCODER_FILE))


def trainable(arguments: TrainArguments, shape: Shape, total: int) -> int:
    """How many numbers the method trains, of the base's `total`; known without loading anything."""
    per_layer = shape.hidden * 2 + sum(shape.qkv_rows) * (shape.hidden + 1)
    per_layer += shape.hidden * shape.qkv_rows[0] + 3 * shape.ffn * shape.hidden
    if arguments.method == "full":
        return total
    if arguments.method == "freeze":
        return per_layer * min(arguments.freeze_layers, shape.layers)
    if arguments.method == "ptuning":
        shapes = encoder_shapes(shape, arguments.prefix_length, arguments.prefix_projection)
        return sum(math.prod(size) for size in shapes.values())
    rows = dict(zip(("q_proj", "k_proj", "v_proj"), shape.qkv_rows, strict=True))
    sizes = {name: (size, shape.hidden) for name, size in rows.items()}
    sizes |= {
        "o_proj": (shape.hidden, shape.qkv_rows[0]),
        "gate_up_proj": (2 * shape.ffn, shape.hidden),
        "down_proj": (shape.hidden, shape.ffn),
    }
    return shape.layers * arguments.lora_rank * sum(sum(sizes[name]) for name in LORA_TARGETS[arguments.lora_target])


def _quantisation(arguments: TrainArguments, compute: torch.dtype) -> dict:
    if arguments.base_bits is None:
        return {}
    return {"quantization_config": in_fewer_bits(arguments.base_bits, compute, double=True)}


def _last_layers(model: GlmForCausalLM, count: int, dtype: torch.dtype) -> GlmForCausalLM:
    model.requires_grad_(False)
    for layer in model.model.layers[-count:]:
        layer.to(dtype).requires_grad_(True)
    return model


def _with_lora(model: GlmForCausalLM, arguments: TrainArguments) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if arguments.base_bits:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=list(LORA_TARGETS[arguments.lora_target]),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # PEFT asks transformers by a name that is about to go
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        return get_peft_model(model, config)  # in float32, whatever the base is in


def _save_lora(model: torch.nn.Module, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    from peft import get_peft_model_state_dict

    # no embedding layers: PEFT would look up the base on the hub to see whether they changed
    weights = get_peft_model_state_dict(model, state_dict=dict(state), save_embedding_layers=False)
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / LORA_FILE, metadata={"format": "pt"})
    config = model.peft_config["default"]
    kept = {name: getattr(config, name) for name in ("r", "lora_alpha", "lora_dropout")}
    fixed = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True}
    write_json(folder / CONFIG_FILE, {**fixed, **kept, "target_modules": sorted(config.target_modules)})
