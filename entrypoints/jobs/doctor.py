"""Show what this machine offers: Python, packages, devices, memory, disk, and what is missing."""

import argparse
import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from pathlib import Path

from entrypoints.settings import Settings

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
    "huggingface-hub",
    "modelscope",
)
ENOUGH_SHARED = 10**9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm doctor`."""
    parser.add_argument("--model", type=Path, help="a converted checkpoint: also check it, and whether it fits")


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Print one line a fact; a model that does not fit or is damaged is an error."""
    from entrypoints.engines.machine import available_cpus, available_memory

    _line("python", f"{platform.python_version()} ({sys.executable})")
    for name in PACKAGES:
        _line(name, _version(name))
    _line("memory", f"{available_memory() / 1e9:.1f} GB available")
    _line("disk", f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB free in {Path.cwd()}")
    _line("/dev/shm", _shared_memory())
    _line("llama.cpp", _quantiser())
    if importlib.util.find_spec("torch"):
        from entrypoints.engines.placement import devices

        for name, description in devices():
            _line(name, description)
    else:
        _line("processor", f"{available_cpus()} threads; without torch GGUF files can be served and nothing else")
    _line("settings", str(settings))
    model = args.model or (Path(settings.model_path) if settings.model_path else None)
    if model:
        _check_model(model, settings)


def _check_model(folder: Path, settings: Settings) -> None:
    if folder.suffix == ".gguf":
        from entrypoints.checkpoint.gguf import open_gguf

        opened = open_gguf(folder)
        _line("model", f"{folder}, {opened.type}, {opened.shape.layers} layers, window {opened.window}")
        return
    from entrypoints.checkpoint.native import open_native
    from entrypoints.engines.placement import place, weight_bytes

    checkpoint = open_native(folder)
    _line(
        "model",
        f"{folder}, {checkpoint.shape.layers} layers, window {checkpoint.shape.window}, files as they should be",
    )
    for name, size in (("float32", 4), ("bfloat16", 2)):
        _line(f"  {name}", f"{weight_bytes(checkpoint.shape, size) / 1e9:.2f} GB of weights")
    _print_choices(checkpoint.shape)
    _line("  goes to", str(place(checkpoint.shape, settings.device)))


def _print_choices(shape: object) -> None:
    if importlib.util.find_spec("gguf") is None:
        _line("  would fit", "unknown: sizes of GGUF types need the package gguf")
        return
    from entrypoints.engines.fitting import gpu_choices, host_choices

    for choice in host_choices(shape):
        _line(f"  {choice.gigabytes} GB memory", str(choice))
    for choice in gpu_choices(shape):
        _line(f"  {choice.gigabytes} GB GPU", str(choice))


def _quantiser() -> str:
    if importlib.util.find_spec("gguf") is None:
        return "missing: glm quantize needs the packages gguf and xllamacpp"
    from entrypoints.checkpoint.ggml import quantiser_missing

    missing = quantiser_missing()
    return f"{missing}: only q4_0, q8_0 and f16 can be made" if missing else "all types of glm quantize"


def _shared_memory() -> str:
    """NCCL and data loaders share memory there; containers get 64 MB of it unless told otherwise."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return "none"
    free = shutil.disk_usage(folder).free
    few = "" if free >= ENOUGH_SHARED else "; several GPUs need 1 GB or more: --shm-size, or an emptyDir of memory"
    return f"{free / 1e9:.1f} GB free{few}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _line(name: str, value: str) -> None:
    print(f"{name:16} {value}")
