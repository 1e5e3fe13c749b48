"""Show what this machine offers: Python, packages, devices, driver, memory, disk; what is missing, and the remedy."""

import argparse
import importlib.util
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from entrypoints.errors import UserError
from entrypoints.settings import Settings

if TYPE_CHECKING:
    from entrypoints.checkpoint.layout import Shape

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
        "--model", type=Path, help="converted checkpoint or GGUF file: also check it, and whether it fits"
    )


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Print one line a fact; a model that does not fit or is damaged is an error."""
    from entrypoints.engines import diagnosis

    _line("python", f"{platform.python_version()} ({sys.executable})")
    for name in PACKAGES:
        _line(name, diagnosis.version(name))
    _line("memory", diagnosis.memory())
    _line("threads", diagnosis.processors())
    _line("disk", diagnosis.disk(Path.cwd()))
    _line("/dev/shm", diagnosis.shared_memory())
    _line("driver", diagnosis.driver())
    _line("toolkit", diagnosis.container_toolkit())
    _line("llama.cpp", _llama_cpp())
    if importlib.util.find_spec("torch"):
        from entrypoints.engines.placement import devices

        for name, description in devices():
            _line(name, description)
    else:
        _line("processor", "without torch GGUF files can be served and nothing else; none can be made")
    _line("settings", str(settings))
    model = args.model or (Path(settings.model_path) if settings.model_path else None)
    if model:
        _check_model(model, settings)


def _check_model(model: Path, settings: Settings) -> None:
    if model.suffix == ".gguf":
        _check_file(model)
    else:
        _check_folder(model, settings)


def _check_file(file: Path) -> None:
    from entrypoints.engines.loading import require_engine

    require_engine("llamacpp")
    from entrypoints.checkpoint.gguf import open_gguf
    from entrypoints.engines.llamacpp_engine import needed_bytes, require_memory
    from entrypoints.engines.machine import available_memory

    opened = open_gguf(file)
    shape, size = opened.shape, file.stat().st_size
    _line("model", f"{file}, {opened.type}, {shape.layers} layers, window {shape.window}")
    _line("  needs", f"{needed_bytes(shape, size, 1, shape.window) / 1e9:.1f} GB with {_one_slot(shape)}")
    _line("  available", f"{available_memory() / 1e9:.1f} GB")
    require_memory(opened, slots=1, window=shape.window)


def _check_folder(folder: Path, settings: Settings) -> None:
    from entrypoints.engines.loading import require_engine

    require_engine("transformers")
    from entrypoints.checkpoint.native import open_native
    from entrypoints.engines.placement import place, weight_bytes

    checkpoint = open_native(folder, quantised=True)
    _line(
        "model",
        f"{folder}, {checkpoint.shape.layers} layers, window {checkpoint.shape.window}, files as they should be",
    )
    if checkpoint.load_in:
        _line(f"  {checkpoint.load_in}", f"{checkpoint.files.size / 1e9:.2f} GB of weights")
    else:
        for name, size in (("float32", 4), ("bfloat16", 2)):
            _line(f"  {name}", f"{weight_bytes(checkpoint.shape, size) / 1e9:.2f} GB of weights")
        _print_choices(checkpoint.shape)
    _line("  goes to", str(place(checkpoint.shape, settings.device, load_in=checkpoint.load_in, stored=True)))


def _print_choices(shape: "Shape") -> None:
    if importlib.util.find_spec("gguf") is None:
        _line("  would fit", "unknown: sizes of GGUF types need the package gguf")
        return
    from entrypoints.engines.fitting import gpu_choices, here, host_choices
    from entrypoints.engines.machine import available_memory

    _line("  counted with", _one_slot(shape))
    _line("  fits here", ", ".join(here(shape, available_memory())) or "nothing of this model without a GPU")
    for choice in host_choices(shape):
        _line(f"  {choice.gigabytes} GB memory", str(choice))
    for choice in gpu_choices(shape):
        _line(f"  {choice.gigabytes} GB GPU", str(choice))


def _one_slot(shape: "Shape") -> str:
    """What GGUF files are counted with, and what `glm serve` takes for more."""
    from entrypoints.engines.llamacpp_engine import slot_bytes

    further = slot_bytes(shape, shape.window) / 1e9
    return f"--slots 1 of {shape.window} tokens; {further:.2f} GB more for each further slot"


def _llama_cpp() -> str:
    from entrypoints.engines.llamacpp_build import require_processor, unused
    from entrypoints.engines.loading import require_engine
    from entrypoints.engines.packages import QUANTISING, require_packages

    try:
        require_engine("llamacpp")
        require_processor()  # before anything of its library computes
    except UserError as error:
        return f"does not run here: {error}"
    faster = ", ".join(unused())
    remedy = f"; faster with {faster}: make llamacpp, or LLAMACPP_CPU for an image" if faster else ""
    try:
        require_packages(*QUANTISING)
    except UserError as error:
        return f"runs GGUF files; glm quantize makes none here: {error}{remedy}"
    from entrypoints.checkpoint.ggml import quantiser_missing

    missing = quantiser_missing()
    types = f"{missing}: only q4_0, q8_0 and f16 can be made" if missing else "all GGUF types of glm quantize"
    return f"{types}{remedy}"


def _line(name: str, value: str) -> None:
    print(f"{name:16} {value}")
