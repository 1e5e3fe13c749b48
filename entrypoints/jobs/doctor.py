"""Show what this machine offers: Python, packages, devices, memory, disk, and what is missing."""

import argparse
import importlib.metadata
import platform
import shutil
import sys
from pathlib import Path

from entrypoints.settings import Settings

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "datasets", "huggingface-hub", "modelscope")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm doctor`."""
    parser.add_argument("--model", type=Path, help="a converted checkpoint: also check it, and whether it fits")


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Print one line a fact; a model that does not fit or is damaged is an error."""
    from entrypoints.engines.placement import available_memory, devices

    _line("python", f"{platform.python_version()} ({sys.executable})")
    for name in PACKAGES:
        _line(name, _version(name))
    _line("memory", f"{available_memory() / 1e9:.1f} GB available")
    _line("disk", f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB free in {Path.cwd()}")
    for name, description in devices():
        _line(name, description)
    _line("settings", str(settings))
    model = args.model or (Path(settings.model_path) if settings.model_path else None)
    if model:
        _check_model(model, settings)


def _check_model(folder: Path, settings: Settings) -> None:
    from entrypoints.checkpoint.native import open_native
    from entrypoints.engines.placement import place, weight_bytes

    checkpoint = open_native(folder)
    _line(
        "model",
        f"{folder}, {checkpoint.shape.layers} layers, window {checkpoint.shape.window}, files as they should be",
    )
    for name, size in (("float32", 4), ("bfloat16", 2)):
        _line(f"  {name}", f"{weight_bytes(checkpoint.shape, size) / 1e9:.2f} GB of weights")
    _line("  goes to", str(place(checkpoint.shape, settings.device)))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _line(name: str, value: str) -> None:
    print(f"{name:16} {value}")
