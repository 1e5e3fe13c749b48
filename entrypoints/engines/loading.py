"""From a path to a loaded engine; each engine's packages are imported only when it is the one."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from entrypoints.checkpoint.manifest import check_record, record_of
from entrypoints.engines.base import Engine
from entrypoints.engines.packages import FILES, FOLDERS, require_packages
from entrypoints.errors import UserError
from entrypoints.settings import LOADS

if TYPE_CHECKING:
    from entrypoints.checkpoint.native import NativeCheckpoint

PACKAGES = {"transformers": "transformers", "llamacpp": "xllamacpp", "vllm": "vllm"}
FILE_DEVICES = ("auto", "cpu")  # where llama.cpp computes


def engine_for(model: Path) -> str:
    """The engine that a model is for: llamacpp for a GGUF file, else transformers."""
    return "llamacpp" if model.suffix == ".gguf" else "transformers"


def check(
    engine: str,
    model: Path,
    adapters: Mapping[str, Path],
    load_in: str | None = None,
    device: str = "auto",
    speculative: bool = False,
    dtype: str = "auto",
    verify: bool = False,
) -> None:
    """Raise UserError for what can be known without loading: packages, flags, files, names, sizes."""
    require_engine(engine)
    _check_flags(engine, load_in, speculative)
    if engine == "llamacpp":
        _check_file(model, adapters, device, dtype, verify)
        return
    if model.suffix == ".gguf":
        raise UserError(f"the engine {engine} does not read GGUF files", "use --engine llamacpp")
    from entrypoints.checkpoint.adapters import open_adapter
    from entrypoints.checkpoint.manifest import refuse_other_base
    from entrypoints.checkpoint.native import open_native

    checkpoint = open_native(model, quantised=engine == "transformers")
    shape = checkpoint.shape
    if engine == "transformers" and (load_in or checkpoint.load_in):
        _check_bits(checkpoint, load_in, adapters, device)
    opened = {name: open_adapter(path, shape) for name, path in adapters.items()}
    for path in adapters.values():
        refuse_other_base(path, model)
    if engine == "vllm":
        from entrypoints.engines.vllm_settings import refuse_prefixes

        refuse_prefixes(opened)


def require_engine(engine: str) -> None:
    """Raise UserError where a package that the engine stands on is not installed; imports none."""
    if engine != "vllm":
        require_packages(*(FILES if engine == "llamacpp" else FOLDERS))
    elif importlib.util.find_spec(PACKAGES[engine]) is None:
        raise UserError(f"the engine {engine} needs the package vllm", "install it, or choose another --engine")


def _check_file(model: Path, adapters: Mapping[str, Path], device: str, dtype: str, verify: bool) -> None:
    """What cannot be asked of a GGUF file is refused, never left out in silence."""
    if adapters:
        raise UserError("a GGUF file cannot take adapters", "merge it in: glm quantize --adapter")
    if dtype != "auto":
        raise UserError(
            f"--dtype {dtype} is not for a GGUF file", "it has the precision it was written in: glm quantize chooses it"
        )
    if device not in FILE_DEVICES:
        raise UserError(
            f"--device {device} is not for a GGUF file",
            "llama.cpp computes on the processor: leave --device and DEVICE out, or name a folder",
        )
    from entrypoints.checkpoint.gguf import open_gguf

    open_gguf(model)
    if verify and not record_of(model).is_file():
        raise UserError(
            f"--verify has nothing to hold {model} against: {record_of(model).name} is not beside it",
            "leave it out, or have glm prepare make the file, which writes that record",
        )


def _check_flags(engine: str, load_in: str | None, speculative: bool) -> None:
    if load_in and engine == "llamacpp":
        raise UserError(
            "--load-in is not for the engine llamacpp", "a GGUF file has its own precision: glm quantize chooses it"
        )
    if load_in == "4bit" and engine == "vllm":
        raise UserError("vLLM makes 8 bits of a folder, and not 4", "--load-in 8bit, or --engine transformers")
    if speculative and engine != "llamacpp":
        raise UserError(f"--speculative is not for the engine {engine}", "leave it out, or serve a GGUF file")


def load(
    engine: str,
    model: Path,
    adapters: Mapping[str, Path],
    device: str = "auto",
    dtype: str = "auto",
    slots: int = 1,
    verify: bool = False,
    load_in: str | None = None,
    speculative: bool = False,
) -> Engine:
    """Load it; raises UserError for what cannot work."""
    if engine == "llamacpp":
        from entrypoints.engines.llamacpp_engine import LlamaCppEngine

        if verify:
            check_record(model)
        return LlamaCppEngine.load(model, slots=slots, speculative=speculative)
    if engine == "vllm":
        from entrypoints.engines.vllm_engine import VllmEngine

        return VllmEngine.load(model, adapters, slots, device, dtype, verify, load_in=load_in)
    from entrypoints.engines.transformers_engine import TransformersEngine

    return TransformersEngine.load_for_serving(model, adapters, device, dtype, slots, verify, load_in)


def _check_bits(checkpoint: "NativeCheckpoint", load_in: str | None, adapters: Mapping[str, Path], device: str) -> None:
    what = "--load-in" if load_in else f"{checkpoint.folder}, stored in fewer bits,"
    if load_in and checkpoint.load_in:
        raise UserError(
            f"{checkpoint.folder} is stored in {LOADS[checkpoint.load_in]} bits already", "leave out --load-in"
        )
    if adapters:
        raise UserError(f"{what} takes no --adapter", "merge a LoRA first: glm export ADAPTER OUT --base DIR")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{what} needs the package bitsandbytes", "pip install 'glm-entrypoints[qlora]'")
    from entrypoints.engines.placement import place

    place(checkpoint.shape, device, load_in=load_in or checkpoint.load_in, stored=load_in is None)
