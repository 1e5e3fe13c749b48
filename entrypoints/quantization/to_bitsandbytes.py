"""Save a converted checkpoint with the weight matrices of its layers in 8 or 4 bits, as a folder for transformers.

bitsandbytes quantizes on the CPU with the code that `--load-in` runs at every start, so both give the same answers.
Loading the folder never takes the memory of the full-precision model.
"""

import logging
from pathlib import Path

import torch

from entrypoints.checkpoint.atomic_files import atomic_folder, require_disk_space
from entrypoints.checkpoint.layout import FOLDER_QUANTIZATIONS
from entrypoints.checkpoint.manifest import MANIFEST_FILE, read_manifest, write_manifest
from entrypoints.checkpoint.native import (
    NativeCheckpoint,
    copy_vocabulary,
    open_native,
    safetensors_errors_as_os_errors,
    write_config_files,
)
from entrypoints.checkpoint.tensor_files import read_json
from entrypoints.engines.transformers.model import load_model
from entrypoints.errors import UserError
from entrypoints.file_writing import write_json
from entrypoints.hardware.placement import (
    MEMORY_HEADROOM_FACTOR,
    Placement,
    bitsandbytes_config,
    cpu_has_native_bf16,
    limit_torch_threads,
    quantization_workspace_bytes,
    quantized_weight_bytes,
)
from entrypoints.hardware.resources import available_memory
from entrypoints.quantization.divergence import DivergenceResult, measure_folder, require_small_divergence
from entrypoints.settings import LOAD_IN_BITS
from entrypoints.sizes import format_size

logger = logging.getLogger(__name__)
MAX_SHARD_SIZE = "2GB"


def quantize_folder(folder: Path, target: Path, type_: str) -> tuple[int, DivergenceResult]:
    """Write and validate the folder; returns its size in bytes and its divergence.

    type_: a key of FOLDER_QUANTIZATIONS.
    Raises UserError for what cannot be quantized and for a divergence above the limit; nothing is left then.
    """
    if target.exists():
        raise UserError(f"{target} exists", "choose another name, or move it elsewhere")
    limit_torch_threads()
    checkpoint = open_native(folder)
    dtype = next(iter(checkpoint.files.tensors.values())).dtype
    size = quantized_weight_bytes(checkpoint.model_config, FOLDER_QUANTIZATIONS[type_], dtype.itemsize)
    _require_memory(checkpoint, type_, size)
    with atomic_folder(target) as partial:
        require_disk_space(partial, size)
        _write(checkpoint, partial, type_, dtype)
        result = measure_folder(partial, checkpoint)
        require_small_divergence(result, type_)
    return sum(file.stat().st_size for file in target.iterdir()), result


def _require_memory(checkpoint: NativeCheckpoint, type_: str, size: int) -> None:
    """Raise UserError unless the memory suffices to quantize to `size` bytes, and to load the result for validation."""
    itemsize = 2 if cpu_has_native_bf16() else 4  # without bfloat16 the CPU computes in float32
    loaded = quantized_weight_bytes(checkpoint.model_config, FOLDER_QUANTIZATIONS[type_], itemsize)
    needed = max(size + quantization_workspace_bytes(checkpoint.model_config), int(loaded * MEMORY_HEADROOM_FACTOR))
    if (free := available_memory()) < needed:
        raise UserError(
            f"quantizing {checkpoint.folder} to {type_} needs {format_size(needed)} of memory, "
            f"{format_size(free)} are available",
            "free memory; a GGUF file needs less: --type q4_0",
        )


def _write(checkpoint: NativeCheckpoint, partial: Path, type_: str, dtype: torch.dtype) -> None:
    load_in = FOLDER_QUANTIZATIONS[type_]
    logger.info("quantizing %s to %s", checkpoint.folder, type_)
    # saved before the first forward pass: on CPUs that one rearranges 4-bit weights into an order that cannot be saved
    model = load_model(checkpoint.folder, Placement({"": "cpu"}, dtype), load_in)
    with safetensors_errors_as_os_errors():
        model.save_pretrained(partial, max_shard_size=MAX_SHARD_SIZE)
    for file in partial.iterdir():
        file.chmod(0o644)  # safetensors creates files with mode 0600, which another user of a container cannot read
    copy_vocabulary(checkpoint.folder, partial)
    dtype_name = str(dtype).removeprefix("torch.")
    write_config_files(partial, checkpoint.model_config, dtype_name, checkpoint.tokenizer, checkpoint.prompt_format)
    config = partial / "config.json"
    quantization_config = bitsandbytes_config(LOAD_IN_BITS[load_in], dtype).to_dict()
    write_json(config, read_json(config) | {"quantization_config": quantization_config})
    has_manifest = (checkpoint.folder / MANIFEST_FILE).is_file()
    source_provenance = read_manifest(checkpoint.folder)["provenance"] if has_manifest else {}
    provenance = {"made_by": "glm quantize", "type": type_, "source": checkpoint.folder.resolve().name}
    write_manifest(partial, {**source_provenance, **provenance})
