"""What each method trains and saves: full, freeze, lora, qlora, ptuning."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from transformers import GlmForCausalLM

from entrypoints.checkpoint.adapter_config import CONFIG_FILE
from entrypoints.checkpoint.adapters import PREFIX_FILE, prefix_config
from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.checkpoint.lora import LORA_FILE
from entrypoints.checkpoint.prefix_encoder import compute_prefix, encoder_shapes
from entrypoints.engines.transformers.model import (
    ATTENTION,
    no_generation_config,
    read_model_config,
    without_peft_warning,
)
from entrypoints.engines.transformers.prefix_model import change_class
from entrypoints.file_writing import write_json
from entrypoints.hardware.placement import bitsandbytes_config
from entrypoints.training.arguments import LORA_TARGETS, TrainArguments
from entrypoints.training.methods import attention
from entrypoints.training.methods.continued_adapter import ENCODER_FILE
from entrypoints.training.methods.loss import GlmForFineTuning
from entrypoints.training.methods.ptuning import ENCODER, GlmForPrefixTuning

if TYPE_CHECKING:
    from peft import PeftModel

SHARD_SIZE = "5GB"


def load(
    arguments: TrainArguments,
    model_config: ModelConfig,
    compute_dtype: torch.dtype,
    deepspeed: bool = False,
    device: torch.device | None = None,
) -> torch.nn.Module:
    """The base model with the trainable parameters of the method.

    Trainable parameters are in float32, also where the forward pass computes in 16 bits, because fp16 gradients cannot
    be unscaled. Frozen ones are in `compute_dtype`. With `deepspeed` all are: DeepSpeed keeps float32 copies itself.
    device: where to load it, one tensor after the other; None: in host memory, or partitioned where ZeRO-3 is enabled.
    """
    dtype = torch.float32 if arguments.method == "full" and not deepspeed else compute_dtype
    model = _load_base(arguments, dtype, compute_dtype, device)
    if arguments.method == "freeze":
        return _unfreeze_last_layers(model, arguments.freeze_layers, compute_dtype if deepspeed else torch.float32)
    if arguments.method in ("lora", "qlora"):
        return _with_lora(model, arguments, compute_dtype)
    if arguments.method == "ptuning":
        tuned: Any = GlmForPrefixTuning.wrap(model, model_config, arguments.prefix_length, arguments.prefix_projection)
        if arguments.adapter:
            load_prefix(tuned, arguments.adapter)
        return cast("torch.nn.Module", tuned)
    return model


def _load_base(
    arguments: TrainArguments, dtype: torch.dtype, compute_dtype: torch.dtype, device: torch.device | None
) -> GlmForFineTuning:
    """The base model in `dtype`, or quantized and computing in `compute_dtype`, with the loss of this package."""
    kernel = ATTENTION if arguments.method == "ptuning" else attention.register()  # a prefix has its own mask
    quantization: dict[str, Any] = {}
    if arguments.quantized_bits is not None:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns for every matrix that inputs are cast
        quantization["quantization_config"] = bitsandbytes_config(arguments.quantized_bits, compute_dtype, double=True)
    model: Any = GlmForCausalLM.from_pretrained(
        arguments.model_name_or_path,
        config=read_model_config(arguments.model_name_or_path),
        attn_implementation=kernel,
        dtype=dtype,
        generation_config=no_generation_config(),
        local_files_only=True,
        device_map=None if device is None else {"": device},
        **quantization,
    )
    for module in model.modules():
        # bitsandbytes repacks 4-bit weights in an evaluation; they have no gradient afterwards
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    change_class(model, GlmForFineTuning)
    model.replace_output_layer()
    model.label_smoothing = arguments.label_smoothing
    model.config.use_cache = False  # with a cache, packed rows would attend to each other
    return cast("GlmForFineTuning", model)


def save(
    model: torch.nn.Module,
    state: Mapping[str, torch.Tensor],
    folder: Path,
    model_config: ModelConfig,
    dtype: torch.dtype | None,
) -> None:
    """Write the weights of the result: the complete model in `dtype` (None: as they are), or the adapter in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, GlmForPrefixTuning):
        _save_prefix(state, folder, model_config)
    elif isinstance(model, GlmForCausalLM):
        weights = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in state.items()}
        model.save_pretrained(folder, state_dict=weights, max_shard_size=SHARD_SIZE)
    else:
        _save_lora(model, state, folder)


def load_prefix(model: GlmForPrefixTuning, folder: Path) -> None:
    """Load the prefix encoder of a checkpoint or adapter into the model.

    A prefix in another program's layout has no encoder after its conversion: its keys and values are the parameters.
    """
    if (folder / ENCODER_FILE).is_file():
        model.prefix_encoder.load_state_dict(load_file(folder / ENCODER_FILE))
        return
    prefix = load_file(folder / PREFIX_FILE)["prefix"]  # (num_layers * 2, num_kv_heads, length, head_dim)
    flat = prefix.permute(2, 0, 1, 3).flatten(1)  # (length, width)
    model.prefix_encoder.load_state_dict({"embedding.weight": flat.float()})


def count_trainable(arguments: TrainArguments, model_config: ModelConfig, total: int) -> int:
    """Number of parameters that the method trains, of the base model's `total`; nothing is loaded."""
    hidden = model_config.hidden_size
    linear = {  # (outputs, inputs) of each linear layer
        **{
            name: (size, hidden)
            for name, size in zip(("q_proj", "k_proj", "v_proj"), model_config.qkv_rows, strict=True)
        },
        "o_proj": (hidden, model_config.qkv_rows[0]),
        "gate_up_proj": (2 * model_config.intermediate_size, hidden),
        "down_proj": (hidden, model_config.intermediate_size),
    }
    if arguments.method == "full":
        return total
    if arguments.method == "freeze":
        layer = sum(map(math.prod, linear.values())) + sum(model_config.qkv_rows) + 2 * hidden  # biases and two norms
        return layer * min(arguments.freeze_layers, model_config.num_layers)
    if arguments.method == "ptuning":
        shapes = encoder_shapes(model_config, arguments.prefix_length, arguments.prefix_projection)
        return sum(math.prod(shape) for shape in shapes.values())
    targets = LORA_TARGETS[arguments.lora_target]
    return model_config.num_layers * arguments.lora_rank * sum(sum(linear[name]) for name in targets)


def _unfreeze_last_layers(model: GlmForCausalLM, count: int, dtype: torch.dtype) -> GlmForCausalLM:
    model.requires_grad_(False)
    for layer in model.model.layers[-count:]:
        layer.to(dtype).requires_grad_(True)
    return model


def _with_lora(model: GlmForCausalLM, arguments: TrainArguments, compute_dtype: torch.dtype) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from peft.tuners.lora.layer import LoraLayer

    # without PEFT's prepare_model_for_kbit_training: it would hold embedding, output layer and norms in float32, and
    # with them the hidden states, which costs memory and which a LoRA beside unquantized weights does without
    config = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=list(LORA_TARGETS[arguments.lora_target]),
        task_type="CAUSAL_LM",
    )
    with without_peft_warning():
        peft_model: torch.nn.Module = get_peft_model(model, config)  # in float32, whatever the dtype of the base
    if compute_dtype != torch.float32:  # PEFT would cast each input to float32, and autocast the copy back to 16 bits
        for module in peft_model.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = False
    if arguments.adapter:
        set_peft_model_state_dict(peft_model, load_file(arguments.adapter / LORA_FILE))
    return peft_model


def _save_prefix(state: Mapping[str, torch.Tensor], folder: Path, model_config: ModelConfig) -> None:
    encoder = {name.removeprefix(ENCODER): tensor for name, tensor in state.items() if name.startswith(ENCODER)}
    encoder = {name: tensor.detach().float().cpu().contiguous() for name, tensor in encoder.items()}
    save_file(encoder, folder / ENCODER_FILE, metadata={"format": "pt"})
    save_file({"prefix": compute_prefix(encoder, model_config)}, folder / PREFIX_FILE, metadata={"format": "pt"})
    write_json(folder / CONFIG_FILE, prefix_config(len(encoder["embedding.weight"])))


def _save_lora(model: torch.nn.Module, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    from peft import get_peft_model_state_dict

    # without embedding layers: PEFT would query the hub for the base model to see whether they changed
    peft_model = cast("PeftModel", model)
    weights = get_peft_model_state_dict(peft_model, state_dict=dict(state), save_embedding_layers=False)
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / LORA_FILE, metadata={"format": "pt"})
    config: Any = peft_model.peft_config["default"]
    kept = {name: getattr(config, name) for name in ("r", "lora_alpha", "lora_dropout")}
    fixed = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True}
    write_json(folder / CONFIG_FILE, {**fixed, **kept, "target_modules": sorted(config.target_modules)})
