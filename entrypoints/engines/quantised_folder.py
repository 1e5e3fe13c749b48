"""A converted checkpoint saved with the matrices of its layers in 8 or 4 bits: a folder that loads as small as it is.

Made on the processor, by the code of bitsandbytes that `--load-in` runs at every start, so both give the same answers.
"""

import logging
from pathlib import Path

import torch

from entrypoints.checkpoint.files import require_space, written_beside
from entrypoints.checkpoint.layout import FOLDER_TYPES
from entrypoints.checkpoint.manifest import MANIFEST_FILE, read_manifest, write_manifest
from entrypoints.checkpoint.native import (
    NativeCheckpoint,
    copy_vocabulary,
    disk_errors,
    open_native,
    write_json,
    write_settings,
)
from entrypoints.checkpoint.original import read_json
from entrypoints.engines.gguf_check import Comparison, compare_folder, require_near
from entrypoints.engines.machine import available_memory
from entrypoints.engines.placement import (
    HEADROOM,
    Placement,
    cpu_computes_bf16,
    in_fewer_bits,
    loaded_bytes,
    quantising_bytes,
    share_processors,
)
from entrypoints.engines.transformers_engine import load_model
from entrypoints.errors import UserError
from entrypoints.settings import LOADS

logger = logging.getLogger(__name__)
SHARD = "2GB"


def quantise_folder(folder: Path, target: Path, type_: str) -> tuple[int, Comparison]:
    """Write and check the folder; returns its size in bytes and how near it is. type_: one of FOLDER_TYPES.

    Raises UserError for what cannot be made, and when the result is not its source; then nothing is left.
    """
    if target.exists():
        raise UserError(f"{target} exists", "choose another name, or remove it")
    share_processors()
    checkpoint = open_native(folder)
    dtype = next(iter(checkpoint.files.tensors.values())).dtype
    size = loaded_bytes(checkpoint.shape, FOLDER_TYPES[type_], dtype.itemsize)
    checked = loaded_bytes(checkpoint.shape, FOLDER_TYPES[type_], 2 if cpu_computes_bf16() else 4)
    needed = max(size + quantising_bytes(checkpoint.shape), int(checked * HEADROOM))
    if (free := available_memory()) < needed:
        raise UserError(
            f"quantising {folder} to {type_} needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are available",
            "free memory; a GGUF file is made in less: --type q4_0",
        )
    with written_beside(target) as partial:
        require_space(partial, size)
        _write(checkpoint, partial, type_, dtype)
        found = compare_folder(partial, checkpoint)
        require_near(found, type_)
    return sum(file.stat().st_size for file in target.iterdir()), found


def _write(checkpoint: NativeCheckpoint, partial: Path, type_: str, dtype: torch.dtype) -> None:
    load_in = FOLDER_TYPES[type_]
    logger.info("quantising %s to %s", checkpoint.folder, type_)
    # saved before it computes anything: on processors 4 bits are then laid out anew, in an order that is never stored
    model = load_model(checkpoint.folder, Placement({"": "cpu"}, dtype), load_in)
    with disk_errors():
        model.save_pretrained(partial, max_shard_size=SHARD)
    for file in partial.iterdir():
        file.chmod(0o644)  # the library makes weights 0600, which a container's other user cannot read
    copy_vocabulary(checkpoint.folder, partial)
    name = str(dtype).removeprefix("torch.")
    write_settings(partial, checkpoint.shape, name, checkpoint.tokenizer, checkpoint.prompt_format)
    config = partial / "config.json"
    write_json(config, read_json(config) | {"quantization_config": in_fewer_bits(LOADS[load_in], dtype).to_dict()})
    described = (checkpoint.folder / MANIFEST_FILE).is_file()
    origin = read_manifest(checkpoint.folder)["provenance"] if described else {}
    made = {"made_by": "glm quantize", "type": type_, "source": checkpoint.folder.resolve().name}
    write_manifest(partial, {**origin, **made})
