"""Show what this machine offers: Python, packages, devices, driver, memory, disk; what is missing, and the remedy."""

import argparse
import importlib.util
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from entrypoints.engines.packages import CHECKPOINT_PACKAGES, require_packages
from entrypoints.errors import UserError
from entrypoints.settings import Settings
from entrypoints.sizes import format_size

if TYPE_CHECKING:
    from entrypoints.checkpoint.layout import ModelConfig

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "datasets",
    "deepspeed",
    "vllm",
    "xllamacpp",
    "bitsandbytes",
    "huggingface-hub",
    "modelscope",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm doctor`."""
    parser.add_argument(
        "--model",
        type=Path,
        help="converted checkpoint or GGUF file: also check it, and whether it fits in memory; a folder with only "
        "config.json, or the name of a published model, to plan without its weights",
    )
    parser.add_argument(
        "--gpu-memory",
        metavar="GB|CARD",
        help="plan for a GPU of so many GB, such as 24, or a card, such as L20: which engine fits and how many "
        "concurrent requests; needs --model",
    )


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Print one fact per line; with --gpu-memory only about the model on that GPU.

    Raises UserError for a model that is damaged or does not fit in memory.
    """
    model = args.model or (Path(settings.model_path) if settings.model_path else None)
    if args.gpu_memory:
        _print_plan(model, args.gpu_memory)
        return
    from entrypoints.doctor import checks

    _print_fact("python", f"{platform.python_version()} ({sys.executable})")
    for name in PACKAGES:
        _print_fact(name, checks.package_version(name))
    _print_fact("memory", checks.memory())
    _print_fact("cpus", checks.cpus())
    _print_fact("disk", checks.disk(Path.cwd()))
    for folder in checks.volumes():
        _print_fact("volume", checks.usage(folder))
    _print_fact("/dev/shm", checks.shared_memory())
    _print_fact("driver", checks.driver())
    _print_fact("toolkit", checks.container_toolkit())
    _print_fact("llama.cpp", _llama_cpp())
    if importlib.util.find_spec("torch"):
        from entrypoints.hardware.placement import list_devices

        for name, description in list_devices():
            _print_fact(name, description)
    else:
        _print_fact("cpu", "torch is not installed: only serving GGUF files is possible")
    _print_fact("settings", settings.changed())
    if model and model.suffix == ".gguf":
        _check_file(model)
    elif model:
        _check_folder(model, settings)


def _print_plan(model: Path | None, gpu_memory: str) -> None:
    """What fits on one GPU that this machine need not have. Raises UserError: the model does not fit on it."""
    if model is None:
        raise UserError("--gpu-memory needs a model", "add --model DIR, or a name such as --model THUDM/chatglm3-6b")
    if model.suffix == ".gguf":
        raise UserError(f"{model} runs on CPUs, not on a GPU", "name the model folder, or omit --gpu-memory")
    require_packages(*CHECKPOINT_PACKAGES)
    from entrypoints.doctor import capacity, model_fit
    from entrypoints.hardware.cards import parse_card
    from entrypoints.hardware.placement import weight_bytes
    from entrypoints.hub.model_dimensions import has_weights, read_dimensions

    card, model_config = parse_card(gpu_memory), read_dimensions(model)
    options = model_fit.serving_options(model_config, card)
    _print_fact("model", f"{model}, {model_config.num_layers} layers, context length {model_config.context_length}")
    if not has_weights(model):
        weights = format_size(weight_bytes(model_config, 2))
        _print_fact("  disk", f"{weights} as downloaded, and {weights} converted")
    _print_fact("gpu", str(card))
    if not options:
        raise UserError(
            f"no precision of the model fits on a GPU of {format_size(card.memory)} with one full context",
            "choose a larger GPU, or a GGUF file on CPUs: glm doctor --model without --gpu-memory lists their memory",
        )
    for option in options:
        _print_fact(f"  {option.engine}", str(option))
    _print_fact("  command", options[0].command(str(model) if has_weights(model) else "DIR"))
    load = capacity.Load()
    if card.bandwidth and options[0].engine == "vllm" and not options[0].load_in:
        users = capacity.users_per_replica(card, capacity.Served.in_16_bits(model_config), load)
        _print_fact("  users", f"{users} at {load.speed:.0f} tokens/s each")
    else:
        _print_fact("  users", "unknown; calculated for a named card that holds 16 bits, such as --gpu-memory L20")
    _print_fact("  assumes", capacity.describe(load))


def _check_file(file: Path) -> None:
    from entrypoints.engines.loading import require_engine_packages

    require_engine_packages("llamacpp")
    from entrypoints.checkpoint.gguf_reader import open_gguf
    from entrypoints.engines.llamacpp.engine import needed_bytes, require_memory
    from entrypoints.hardware.resources import available_memory

    opened = open_gguf(file)
    model_config = opened.model_config
    context_length = model_config.context_length
    needed = needed_bytes(model_config, file.stat().st_size, slots=1, context_length=context_length)
    facts = f"{opened.type}, {model_config.num_layers} layers, context length {context_length}"
    _print_fact("model", f"{file}, {facts}")
    _print_fact("  needs", f"{format_size(needed)} with {_one_slot(model_config)}")
    _print_fact("  available", f"{format_size(available_memory())}")
    require_memory(opened, slots=1)


def _check_folder(folder: Path, settings: Settings) -> None:
    from entrypoints.engines.loading import require_engine_packages

    require_engine_packages("transformers")
    from entrypoints.checkpoint.native import open_native
    from entrypoints.hardware.placement import choose_placement, weight_bytes
    from entrypoints.hub.model_dimensions import has_weights, read_dimensions

    if not has_weights(folder):
        model_config = read_dimensions(folder)
        facts = f"{model_config.num_layers} layers, context length {model_config.context_length}"
        _print_fact("model", f"{folder}, {facts}, without weights")
        _print_memory_options(model_config)
        return
    checkpoint = open_native(folder, quantized=True)
    model_config, load_in = checkpoint.model_config, checkpoint.load_in
    facts = f"{model_config.num_layers} layers, context length {model_config.context_length}, files valid"
    _print_fact("model", f"{folder}, {facts}")
    if load_in:
        _print_fact(f"  {load_in}", f"{format_size(checkpoint.files.nbytes, 2)} of weights")
    else:
        for name, itemsize in (("float32", 4), ("bfloat16", 2)):
            _print_fact(f"  {name}", f"{format_size(weight_bytes(model_config, itemsize), 2)} of weights")
        _print_memory_options(model_config)
    placement = choose_placement(model_config, settings.device, load_in=load_in, already_quantized=True)
    _print_fact("  loads on", str(placement))


def _print_memory_options(model_config: "ModelConfig") -> None:
    if importlib.util.find_spec("gguf") is None:
        _print_fact("  fits here", "unknown: the sizes of GGUF types need the package gguf")
        return
    from entrypoints.doctor.model_fit import fitting_formats, gpu_memory_options, host_memory_options
    from entrypoints.hardware.resources import available_memory

    fitting = fitting_formats(model_config, available_memory())
    _print_fact("  assumes", _one_slot(model_config))
    _print_fact("  fits here", ", ".join(fitting) or "no format of this model without a GPU")
    for option in host_memory_options(model_config):
        _print_fact(f"  {option.gigabytes} GB memory", str(option))
    for option in gpu_memory_options(model_config):
        _print_fact(f"  {option.gigabytes} GB GPU", str(option))


def _one_slot(model_config: "ModelConfig") -> str:
    """The slots that the memory of a GGUF file is calculated for, and the memory of further ones."""
    from entrypoints.engines.llamacpp.engine import slot_bytes

    further = format_size(slot_bytes(model_config, model_config.context_length), 2)
    return f"--slots 1 of {model_config.context_length} tokens; each further slot takes {further}"


def _llama_cpp() -> str:
    from entrypoints.engines.llamacpp.cpu_features import load_cpu_code, unused_cpu_features
    from entrypoints.engines.loading import require_engine_packages
    from entrypoints.engines.packages import QUANTIZATION_PACKAGES

    try:
        require_engine_packages("llamacpp")
        name = load_cpu_code()  # before the library computes anything
    except UserError as error:
        return f"cannot run: {error}"
    unused = ", ".join(unused_cpu_features())
    variant = f"; CPU code: {name}" if name else ""
    remedy = f"; faster with {unused}: make llamacpp" if unused else ""
    try:
        require_packages(*QUANTIZATION_PACKAGES)
    except UserError as error:
        return f"runs GGUF files; glm quantize cannot run: {error}{variant}{remedy}"
    return f"all GGUF types of glm quantize{variant}{remedy}"


def _print_fact(name: str, value: str) -> None:
    print(f"{name:16} {value}")
