"""From a path to a loaded engine; each engine's packages are imported only when it is the one."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from entrypoints.engines.base import Engine
from entrypoints.errors import UserError
from entrypoints.settings import LOADS

if TYPE_CHECKING:
    from entrypoints.checkpoint.native import NativeCheckpoint

PACKAGES = {"transformers": "transformers", "llamacpp": "xllamacpp", "vllm": "vllm"}


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
) -> None:
    """Raise UserError for what can be known without loading: packages, files, names, sizes."""
    if importlib.util.find_spec(PACKAGES[engine]) is None:
        raise UserError(
            f"the engine {engine} needs the package {PACKAGES[engine]}", "install it, or choose another --engine"
        )
    _check_flags(engine, load_in, speculative)
    if engine == "llamacpp":
        if adapters:
            raise UserError("a GGUF file cannot take adapters", "merge it in: glm quantize --adapter")
        from entrypoints.checkpoint.gguf import open_gguf

        open_gguf(model)
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
