"""Show what this machine offers: Python, packages, devices, driver, memory, disk; what is missing, and the remedy."""

import argparse
import importlib.util
import platform
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
    "bitsandbytes",
    "huggingface-hub",
    "modelscope",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm doctor`."""
    parser.add_argument("--model", type=Path, help="a converted checkpoint: also check it, and whether it fits")


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
        _line("processor", "without torch GGUF files can be served and nothing else")
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


def _print_choices(shape: object) -> None:
    if importlib.util.find_spec("gguf") is None:
        _line("  would fit", "unknown: sizes of GGUF types need the package gguf")
        return
    from entrypoints.engines.fitting import gpu_choices, here, host_choices
    from entrypoints.engines.machine import available_memory

    _line("  fits here", ", ".join(here(shape, available_memory())) or "nothing of this model without a GPU")
    for choice in host_choices(shape):
        _line(f"  {choice.gigabytes} GB memory", str(choice))
    for choice in gpu_choices(shape):
        _line(f"  {choice.gigabytes} GB GPU", str(choice))


def _llama_cpp() -> str:
    if importlib.util.find_spec("gguf") is None:
        return "missing: glm quantize needs the packages gguf and xllamacpp"
    from entrypoints.checkpoint.ggml import quantiser_missing

    missing = quantiser_missing()
    if missing:
        return f"{missing}: only q4_0, q8_0 and f16 can be made"
    from entrypoints.engines.llamacpp_build import unused

    faster = ", ".join(unused())
    remedy = f"; faster with {faster}: make llamacpp, or LLAMACPP_CPU for an image" if faster else ""
    return f"all types of glm quantize{remedy}"


def _line(name: str, value: str) -> None:
    print(f"{name:16} {value}")
