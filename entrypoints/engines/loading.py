"""Load a model with the engine that suits it. The packages of an engine are imported only when it is selected."""

import importlib.util
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from entrypoints.checkpoint.manifest import record_path
from entrypoints.engines.base import Engine
from entrypoints.engines.options import DEFAULT_SLOTS, GPU_SLOTS, EngineOptions
from entrypoints.engines.packages import GGUF_PACKAGES, TRANSFORMERS_PACKAGES, require_packages
from entrypoints.errors import UserError
from entrypoints.settings import LOAD_IN_BITS

if TYPE_CHECKING:
    from entrypoints.checkpoint.native import NativeCheckpoint

ENGINE_PACKAGES = {"transformers": "transformers", "llamacpp": "xllamacpp", "vllm": "vllm"}
MAX_GGUF_SLOTS = 256  # llama.cpp: LLAMA_MAX_SEQ
GGUF_DEVICES = ("auto", "cpu")  # the published build of llama.cpp computes on CPUs only
OPTIONS_OF_ENGINES = {  # options that only these engines support
    ("llamacpp", "vllm"): ("speculative",),
    ("llamacpp",): ("threads", "use_mmap", "prefix_cache"),
    ("vllm",): ("tensor_parallel_size", "data_parallel_size", "gpu_memory_utilization", "enforce_eager"),
}


def select_engine(model: Path, engine: str = "auto") -> str:
    """The requested engine; auto selects llamacpp for a GGUF file, else transformers."""
    if engine != "auto":
        return engine
    return "llamacpp" if model.suffix == ".gguf" else "transformers"


def default_slots(model: Path, options: EngineOptions) -> int:
    """The answers generated at a time if none are given; `options.engine` is not auto.

    On a GPU transformers gets at most as many as fit beside the weights. Raises UserError: packages, files missing.
    """
    if options.engine == "llamacpp" or options.device not in ("auto", "cuda"):
        return DEFAULT_SLOTS
    require_engine_packages(options.engine)
    from entrypoints.hardware.gpus import list_gpus

    gpus = list_gpus()
    if not gpus or (options.load_in and options.engine != "vllm"):
        return DEFAULT_SLOTS
    from entrypoints.checkpoint.native import open_native

    if options.engine == "vllm":
        from entrypoints.engines.vllm.gpu_settings import gpu_settings

        copies: int = gpu_settings(options.limited(open_native(model)).model_config, options)["data_parallel_size"]
        return GPU_SLOTS * copies
    from entrypoints.engines.transformers.batching_memory import CUDA_CONTEXT_BYTES, fitting_slots
    from entrypoints.hardware.placement import weight_bytes

    model_config = options.limited(open_native(model, quantized=True)).model_config
    itemsize = 4 if options.dtype == "float32" else 2
    free = gpus[0].free - weight_bytes(model_config, itemsize) - CUDA_CONTEXT_BYTES
    return max(1, min(DEFAULT_SLOTS, fitting_slots(model_config, free, itemsize)))


def require_engine_packages(engine: str) -> None:
    """Raise UserError if a package that the engine needs is not installed; imports none of them."""
    if engine != "vllm":
        require_packages(*(GGUF_PACKAGES if engine == "llamacpp" else TRANSFORMERS_PACKAGES))
    elif importlib.util.find_spec(ENGINE_PACKAGES[engine]) is None:
        raise UserError(f"the engine {engine} needs the package vllm", "install it, or choose another --engine")


def check_engine_options(model: Path, options: EngineOptions) -> None:
    """Raise UserError for every error that can be found without loading the model.

    Checks packages, options, files, names and sizes. Does not import transformers, llama.cpp or vLLM.
    """
    engine = select_engine(model, options.engine)
    require_engine_packages(engine)
    _check_combination(model, engine, options)
    if engine == "llamacpp":
        _check_gguf(model, options)
    else:
        _check_folder(model, engine, options)


def load_engine(model: Path, options: EngineOptions) -> Engine:
    """Load the model; raises UserError as `check_engine_options` does, but later for some errors."""
    engine = select_engine(model, options.engine)
    require_engine_packages(engine)
    _check_combination(model, engine, options)
    if engine == "llamacpp":
        from entrypoints.engines.llamacpp.engine import LlamaCppEngine

        return LlamaCppEngine.load(model, options)
    if engine == "vllm":
        from entrypoints.engines.vllm.engine import VllmEngine

        return VllmEngine.load(model, options)
    from entrypoints.engines.transformers.engine import TransformersEngine

    return TransformersEngine.load(model, options)


def _check_combination(model: Path, engine: str, options: EngineOptions) -> None:
    """Raise UserError for options that the engine does not support; unsupported options are never ignored."""
    if options.load_in and engine == "llamacpp":
        raise UserError(
            "--load-in is not supported by the engine llamacpp",
            "omit it; to change the precision of a GGUF file, run glm quantize",
        )
    if options.load_in == "4bit" and engine == "vllm":
        raise UserError(
            "--load-in 4bit is not supported by the engine vllm", "--load-in 8bit, or --engine transformers"
        )
    if options.adapter and engine == "vllm":
        raise UserError("the engine vllm loads adapters by name only", "use EngineOptions.adapters")
    defaults = {one.name: one.default for one in fields(options)}
    for owners, names in OPTIONS_OF_ENGINES.items():
        given = [name for name in names if getattr(options, name) != defaults[name]]
        if engine not in owners and given:
            raise UserError(
                f"--{given[0].replace('_', '-')} is not supported by the engine {engine}",
                "omit it, or use a GGUF file" if "llamacpp" in owners else "omit it, or use --engine vllm",
            )
    if engine != "llamacpp" and model.suffix == ".gguf":
        raise UserError(f"the engine {engine} does not read GGUF files", "use --engine llamacpp")
    if engine == "llamacpp":
        _check_gguf_options(options)


def _check_gguf_options(options: EngineOptions) -> None:
    if options.all_adapters:
        raise UserError("a GGUF file does not support adapters", "merge the adapter: glm quantize --adapter")
    if options.dtype != "auto":
        raise UserError(
            f"--dtype {options.dtype} is not supported for a GGUF file",
            "omit it; to change the precision of a GGUF file, run glm quantize",
        )
    if options.device not in GGUF_DEVICES:
        raise UserError(
            f"--device {options.device} is not supported for a GGUF file",
            "llama.cpp runs on the CPU: omit --device and DEVICE, or use a model folder",
        )
    if options.slots > MAX_GGUF_SLOTS:
        raise UserError(f"--slots {options.slots}: llama.cpp has at most {MAX_GGUF_SLOTS}", "use fewer")


def _check_gguf(model: Path, options: EngineOptions) -> None:
    from entrypoints.checkpoint.gguf_reader import open_gguf

    options.limited(open_gguf(model))
    flag = "--verify" if options.verify else "--prefix-cache" if options.prefix_cache else None
    if flag and not record_path(model).is_file():
        raise UserError(
            f"{flag} needs the hash record of {model}, but {record_path(model).name} is not in the same folder",
            f"copy the record too, or create the file with glm quantize, which writes it, or omit {flag}",
        )


def _check_folder(model: Path, engine: str, options: EngineOptions) -> None:
    from entrypoints.checkpoint.adapters import open_adapter
    from entrypoints.checkpoint.manifest import check_base_weights
    from entrypoints.checkpoint.native import open_native

    checkpoint = options.limited(open_native(model, quantized=engine == "transformers"))
    if engine == "transformers" and (options.load_in or checkpoint.load_in):
        _check_bitsandbytes(checkpoint, options)
    adapters = {name: open_adapter(path, checkpoint.model_config) for name, path in options.adapters.items()}
    if options.adapter:
        open_adapter(options.adapter, checkpoint.model_config)
    for path in options.all_adapters:
        check_base_weights(path, model)
    if engine == "vllm":
        from entrypoints.engines.vllm.engine_args import check_adapters

        check_adapters(adapters)


def _check_bitsandbytes(checkpoint: "NativeCheckpoint", options: EngineOptions) -> None:
    stored, load_in = checkpoint.load_in, options.load_in
    if load_in and stored:
        raise UserError(f"{checkpoint.folder} is already quantized to {LOAD_IN_BITS[stored]} bits", "omit --load-in")
    subject = "--load-in" if load_in else f"{checkpoint.folder}, a quantized folder,"
    if options.all_adapters:
        raise UserError(
            f"{subject} does not support --adapter", "merge a LoRA first: glm export ADAPTER OUT --base DIR"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{subject} needs the package bitsandbytes", "pip install 'glm-entrypoints[qlora]'")
    from entrypoints.hardware.placement import choose_placement

    choose_placement(
        checkpoint.model_config, options.device, load_in=load_in or stored, already_quantized=load_in is None
    )
