"""Write a converted checkpoint as one GGUF file for llama.cpp, in float16 or quantized to 8, 5 or 4 bits.

Tensors are written one at a time, in chunks of rows, so memory use does not grow with the number of layers.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType
from tqdm import tqdm

from entrypoints.chat_format.sampling import Sampling
from entrypoints.checkpoint.adapter_config import CONFIG_FILE
from entrypoints.checkpoint.adapters import Adapter, is_adapter
from entrypoints.checkpoint.atomic_files import atomic_file, require_disk_space
from entrypoints.checkpoint.gguf_reader import ARCHITECTURE, GGUF_TYPES, PROMPT_KEY, PROVENANCE_KEY
from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.checkpoint.lora import merge_function
from entrypoints.checkpoint.manifest import MANIFEST_FILE, read_manifest
from entrypoints.checkpoint.native import NativeCheckpoint, open_native
from entrypoints.checkpoint.tensor_files import WeightFiles, read_json
from entrypoints.errors import UserError
from entrypoints.quantization import ggml
from entrypoints.quantization.gguf_vocabulary import add_vocabulary, read_vocabulary
from entrypoints.quantization.tensor_types import TensorTypePlan, plan_tensor_types

logger = logging.getLogger(__name__)
CHUNK_PARAMETERS = 1 << 22  # one thread's unit of work; bounds the memory beside the finished tensor
MAX_METADATA_BYTES = 32 << 20


@dataclass(frozen=True)
class GgufOptions:
    """Optional inputs of `write_gguf`."""

    adapter: Adapter | None = None  # a LoRA to merge
    importance: Mapping[str, np.ndarray] = field(default_factory=dict)  # native tensor name -> float32 (columns,)
    importance_source: str = ""  # name of the file it was measured on, written to the provenance
    threads: int = 1


def write_gguf(
    folder: Path,
    target: Path,
    type_: str,
    options: GgufOptions = GgufOptions(),
    check: Callable[[Path], object] | None = None,
) -> int:
    """Write `target` atomically from a converted folder; returns its size in bytes. type_: a key of GGUF_TYPES.

    check: called with the temporary file before it is renamed to `target`; if it raises, no file is left.
    Raises UserError: the folder is not a converted full model, the target exists, or the disk is too small.
    """
    check_target(target)
    require_full_model(folder)
    checkpoint = open_native(folder)
    if options.adapter:
        checkpoint = replace(checkpoint, prompt_format=options.adapter.prompt_format)
    vocabulary = read_vocabulary(checkpoint)
    planned = plan_tensor_types(checkpoint.model_config, type_)
    with atomic_file(target) as partial:
        require_disk_space(target.parent, file_bytes(checkpoint.model_config, type_))
        writer = gguf.GGUFWriter(None, ARCHITECTURE)
        try:
            _add_metadata(writer, checkpoint, type_, options)
            add_vocabulary(writer, checkpoint, vocabulary)
            for plan in planned:
                writer.add_tensor_info(plan.name, plan.entry.shape, np.dtype(np.float32), plan.size, plan.ggml_type)
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            _write_tensors(writer, checkpoint.files, planned, options)
        finally:
            writer.close()
        if check:
            check(partial)
    return target.stat().st_size


def file_bytes(model_config: ModelConfig, type_: str) -> int:
    """Upper limit of the size of a file."""
    return sum(plan.size for plan in plan_tensor_types(model_config, type_)) + MAX_METADATA_BYTES


def check_target(target: Path) -> None:
    """Raise UserError if the target exists or does not end in .gguf."""
    if target.suffix != ".gguf":
        raise UserError(f"{target} does not end in .gguf", "add .gguf to its name: GGUF files are recognized by it")
    if target.exists():
        raise UserError(f"{target} exists", "choose another name, or move it elsewhere")


def require_full_model(folder: Path) -> None:
    """Raise UserError if the folder is an adapter: a GGUF file needs all weights."""
    if not is_adapter(folder):
        return
    config_file = folder / CONFIG_FILE
    lora = config_file.is_file() and read_json(config_file).get("peft_type") == "LORA"
    if lora:
        raise UserError(
            f"{folder} is a LoRA adapter, not a full model",
            "pass its converted base model, and the adapter with --adapter",
        )
    raise UserError(
        f"{folder} is a P-Tuning v2 prefix, which a GGUF file cannot store",
        "serve it with its converted base model: --adapter",
    )


def _add_metadata(writer: gguf.GGUFWriter, checkpoint: NativeCheckpoint, type_: str, options: GgufOptions) -> None:
    model_config, folder, default = checkpoint.model_config, checkpoint.folder, Sampling()
    manifest = read_manifest(folder)["provenance"] if (folder / MANIFEST_FILE).is_file() else {}
    provenance = {"made_by": "glm quantize", "type": type_, "source": folder.resolve().name, "source_made": manifest}
    if options.adapter:
        provenance["adapter"] = options.adapter.folder.resolve().name
    if options.importance:
        provenance["imatrix"] = options.importance_source
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(folder.resolve().name)
    writer.add_file_type(GGUF_TYPES[type_])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_sampling_temp(default.temperature)
    writer.add_sampling_top_p(default.top_p)
    writer.add_context_length(model_config.context_length)
    writer.add_embedding_length(model_config.hidden_size)
    writer.add_feed_forward_length(model_config.intermediate_size)
    writer.add_block_count(model_config.num_layers)
    writer.add_head_count(model_config.num_heads)
    writer.add_head_count_kv(model_config.num_kv_heads)
    writer.add_key_length(model_config.head_dim)
    writer.add_value_length(model_config.head_dim)
    writer.add_layer_norm_rms_eps(model_config.rms_norm_eps)
    writer.add_rope_dimension_count(model_config.head_dim // 2)
    writer.add_rope_freq_base(10000.0 * model_config.rope_ratio)
    if model_config.position_divisor != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(model_config.position_divisor))
    writer.add_string(PROMPT_KEY, json.dumps(asdict(checkpoint.prompt_format), ensure_ascii=False))
    writer.add_string(PROVENANCE_KEY, json.dumps(provenance, ensure_ascii=False))


def _write_tensors(
    writer: gguf.GGUFWriter, stored: WeightFiles, planned: list[TensorTypePlan], options: GgufOptions
) -> None:
    merge = merge_function(options.adapter.lora_factors()) if options.adapter else None
    total = sum(plan.size for plan in planned)
    with (
        ThreadPoolExecutor(options.threads) as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=None) as bar,
    ):
        for plan in planned:
            # the files are mapped again for each tensor: pages that were read stay resident as long as the mapping does
            files = {stored.tensors[name].file for name in plan.entry.native}
            mapped = {name: tensor for file in files for name, tensor in stored.load_file(file).items()}
            sources = [mapped[name] for name in plan.entry.native]
            if merge:
                sources = [merge(name, tensor) for name, tensor in zip(plan.entry.native, sources, strict=True)]
            importance = options.importance.get(plan.entry.native[0])
            writer.write_tensor_data(_quantize_tensor(plan, sources, importance, pool))
            bar.update(plan.size)


def _quantize_tensor(
    plan: TensorTypePlan, sources: list[torch.Tensor], importance: np.ndarray | None, pool: ThreadPoolExecutor
) -> np.ndarray:
    """The rows of all `sources`, each `(rows,)` or `(rows, columns)`, as uint8 `(rows, bytes of a row)`."""
    rows = plan.entry.shape[0]
    data = np.empty((rows, plan.size // rows), np.uint8)  # filled in place: np.concatenate would hold it twice
    done = 0
    for part in pool.map(lambda chunk: _quantize_chunk(plan, chunk, importance), _chunks(plan, sources)):
        data[done : done + len(part)] = part
        done += len(part)
    return data


def _chunks(plan: TensorTypePlan, sources: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    rows = max(1, CHUNK_PARAMETERS // torch.Size(plan.entry.columns).numel())
    return (chunk for source in sources for chunk in torch.split(source, rows))


def _quantize_chunk(plan: TensorTypePlan, chunk: torch.Tensor, importance: np.ndarray | None) -> np.ndarray:
    largest = np.finfo(np.float16 if plan.ggml_type is GgmlType.F16 else np.float32).max
    values = chunk.float().numpy().reshape(len(chunk), -1)
    if not max(values.max(), -values.min()) <= largest:  # also true for NaN
        raise UserError(
            f"{plan.entry.native[0]} contains NaN or values above {largest:.0f}", "check the checkpoint's weights"
        )
    return ggml.quantize(values, plan.ggml_type, importance)
