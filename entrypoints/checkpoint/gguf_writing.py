"""Write a converted checkpoint as one GGUF file, which llama.cpp runs: whole, or quantised to 8, 5 or 4 bits.

Tensor by tensor and some rows at a time, so the memory it takes does not grow with the model's layers.
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
from gguf import GGMLQuantizationType as Kind
from tqdm import tqdm

from entrypoints.checkpoint import ggml
from entrypoints.checkpoint.adapters import CONFIG_FILE, Adapter, is_adapter, merging
from entrypoints.checkpoint.files import file_written_beside, require_space
from entrypoints.checkpoint.gguf import ARCHITECTURE, PROMPT_KEY, PROVENANCE_KEY, TOKENIZER_KEY, TYPES
from entrypoints.checkpoint.gguf_plan import Plan, plans
from entrypoints.checkpoint.manifest import MANIFEST_FILE, read_manifest
from entrypoints.checkpoint.native import NativeCheckpoint, open_native
from entrypoints.checkpoint.original import TensorFiles, read_json
from entrypoints.checkpoint.tokenizer import TOKENIZER_FILE, VOCABULARY_FILE, Tokenizer
from entrypoints.errors import UserError
from entrypoints.prompt import CONTROL_TOKENS
from entrypoints.sampling import Sampling

logger = logging.getLogger(__name__)
CHUNK_NUMBERS = 1 << 22  # converted at once by a thread; with the finished tensor this bounds the memory
SMALL_BYTES = 32 << 20  # metadata is less than this


@dataclass(frozen=True)
class Extras:
    """What a plain conversion does without."""

    adapter: Adapter | None = None  # a LoRA, merged in
    importance: Mapping[str, np.ndarray] = field(default_factory=dict)  # native tensor -> weight of each column
    importance_from: str = ""  # what it was measured on, for the file's provenance
    threads: int = 1


def write_gguf(
    folder: Path,
    target: Path,
    type_: str,
    extras: Extras = Extras(),
    check: Callable[[Path], object] | None = None,
) -> int:
    """Write `target` from a converted folder, whole or not at all; returns its size in bytes. type_: one of TYPES.

    check: called with the finished file before it gets its name, which it does not get if this raises.
    Raises UserError when the folder is no whole converted model, the target exists, or the disk is too small.
    """
    refuse_target(target)
    refuse_adapter_alone(folder)
    checkpoint = open_native(folder)
    if extras.adapter:
        checkpoint = replace(checkpoint, prompt_format=extras.adapter.prompt_format)
    vocabulary = _vocabulary(folder, checkpoint.tokenizer, checkpoint.shape.vocabulary)
    planned = plans(checkpoint.shape, type_)
    _require_quantiser(planned, type_)
    with file_written_beside(target) as partial:
        require_space(target.parent, sum(plan.size for plan in planned) + SMALL_BYTES)
        writer = gguf.GGUFWriter(None, ARCHITECTURE)
        try:
            _describe(writer, checkpoint, type_, extras)
            _add_vocabulary(writer, checkpoint, vocabulary)
            for plan in planned:
                writer.add_tensor_info(plan.name, plan.entry.shape, np.dtype(np.float32), plan.size, plan.kind)
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            _write_tensors(writer, checkpoint.files, planned, extras)
        finally:
            writer.close()
        if check:
            check(partial)
    return target.stat().st_size


def _require_quantiser(planned: list[Plan], type_: str) -> None:
    missing = ggml.quantiser_missing()
    if missing and {plan.kind for plan in planned} - ggml.NUMPY_KINDS:
        raise UserError(f"--type {type_} needs llama.cpp's quantiser: {missing}", "use --type q4_0, q8_0 or f16")


def refuse_target(target: Path) -> None:
    """Raise UserError for a name that is taken or would not be recognised."""
    if target.suffix != ".gguf":
        raise UserError(f"{target} does not end in .gguf", "name it so: that is how it is recognised")
    if target.exists():
        raise UserError(f"{target} exists", "choose another name, or remove it")


def refuse_adapter_alone(folder: Path) -> None:
    """Raise UserError for an adapter's folder where a whole model's is needed."""
    if not is_adapter(folder):
        return
    config_file = folder / CONFIG_FILE
    lora = config_file.is_file() and read_json(config_file).get("peft_type") == "LORA"
    if lora:
        raise UserError(
            f"{folder} is a LoRA adapter, no whole model", "name its converted base model, and this with --adapter"
        )
    raise UserError(
        f"{folder} is a P-Tuning v2 prefix, and a GGUF file has no place for one",
        "run it with its converted base model: --adapter",
    )


def _vocabulary(folder: Path, tokenizer: Tokenizer, rows: int) -> list[tuple[str, float, int]]:
    """Text, score and type of each id, padded to the rows of the embedding."""
    import sentencepiece

    file = folder / VOCABULARY_FILE
    if not file.is_file():
        raise UserError(f"{folder} holds no {VOCABULARY_FILE}", "copy it there from the original checkpoint")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    size = pieces.GetPieceSize()
    if size + len(CONTROL_TOKENS) != tokenizer.size:
        raise UserError(
            f"{file} has {size} pieces, {TOKENIZER_FILE} {tokenizer.size - len(CONTROL_TOKENS)}",
            "convert the checkpoint again",
        )

    def type_of(id_: int) -> int:
        if pieces.IsByte(id_):
            return gguf.TokenType.BYTE
        if pieces.IsControl(id_):
            return gguf.TokenType.CONTROL
        return gguf.TokenType.UNKNOWN if pieces.IsUnknown(id_) else gguf.TokenType.NORMAL

    entries = [(pieces.IdToPiece(id_), pieces.GetScore(id_), type_of(id_)) for id_ in range(size)]
    entries += [(name, 0.0, gguf.TokenType.CONTROL) for name in CONTROL_TOKENS]
    return entries + [(f"[PAD{id_}]", -10000.0, gguf.TokenType.UNUSED) for id_ in range(len(entries), rows)]


def _describe(writer: gguf.GGUFWriter, checkpoint: NativeCheckpoint, type_: str, extras: Extras) -> None:
    shape, folder, default = checkpoint.shape, checkpoint.folder, Sampling()
    manifest = read_manifest(folder)["provenance"] if (folder / MANIFEST_FILE).is_file() else {}
    provenance = {"made_by": "glm quantize", "type": type_, "source": folder.resolve().name, "source_made": manifest}
    if extras.adapter:
        provenance["adapter"] = extras.adapter.folder.resolve().name
    if extras.importance:
        provenance["imatrix"] = extras.importance_from
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(folder.resolve().name)
    writer.add_file_type(TYPES[type_])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_sampling_temp(default.temperature)
    writer.add_sampling_top_p(default.top_p)
    writer.add_context_length(shape.window)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.groups)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_rope_dimension_count(shape.head_dim // 2)
    writer.add_rope_freq_base(10000.0 * shape.rope_ratio)
    writer.add_string(PROMPT_KEY, json.dumps(asdict(checkpoint.prompt_format), ensure_ascii=False))
    writer.add_string(PROVENANCE_KEY, json.dumps(provenance, ensure_ascii=False))


def _add_vocabulary(
    writer: gguf.GGUFWriter, checkpoint: NativeCheckpoint, vocabulary: list[tuple[str, float, int]]
) -> None:
    tokenizer = checkpoint.tokenizer
    texts, scores, types = zip(*vocabulary, strict=True)
    writer.add_tokenizer_model("llama")  # llama.cpp's name for SentencePiece BPE
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    # three keys, because llama.cpp stops at these ids alone
    for add, id_ in zip(
        (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), tokenizer.stop_ids, strict=True
    ):
        add(id_)
    writer.add_unk_token_id(tokenizer.pad_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(False)  # the template writes [gMASK]<sop> itself
    writer.add_add_eos_token(False)
    writer.add_chat_template(checkpoint.prompt_format.chat_template())
    writer.add_string(TOKENIZER_KEY, (checkpoint.folder / TOKENIZER_FILE).read_text(encoding="utf-8"))


def _write_tensors(writer: gguf.GGUFWriter, stored: TensorFiles, planned: list[Plan], extras: Extras) -> None:
    changed = merging(extras.adapter) if extras.adapter else None
    total = sum(plan.size for plan in planned)
    with (
        ThreadPoolExecutor(extras.threads) as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=None) as bar,
    ):
        for plan in planned:
            # mapped anew for each tensor: what was read stays in this process's memory as long as the mapping does
            files = {stored.tensors[name].file for name in plan.entry.native}
            mapped = {name: tensor for file in files for name, tensor in stored.of_file(file).items()}
            sources = [mapped[name] for name in plan.entry.native]
            if changed:
                sources = [changed(name, tensor) for name, tensor in zip(plan.entry.native, sources, strict=True)]
            importance = extras.importance.get(plan.entry.native[0])
            writer.write_tensor_data(_quantised(plan, sources, importance, pool))
            bar.update(plan.size)


def _quantised(
    plan: Plan, sources: list[torch.Tensor], importance: np.ndarray | None, pool: ThreadPoolExecutor
) -> np.ndarray:
    """The finished tensor, made some rows at a time."""
    data, done = None, 0
    parts = pool.map(lambda chunk: _part(plan, chunk, importance), _chunks(plan, sources))
    for part in parts:
        if data is None:  # np.concatenate would hold it twice
            data = np.empty((plan.entry.shape[0], *part.shape[1:]), part.dtype)
        data[done : done + len(part)] = part
        done += len(part)
    return data


def _chunks(plan: Plan, sources: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    rows = max(1, CHUNK_NUMBERS // torch.Size(plan.entry.columns).numel())
    return (chunk for source in sources for chunk in source.split(rows))


def _part(plan: Plan, chunk: torch.Tensor, importance: np.ndarray | None) -> np.ndarray:
    largest = np.finfo(np.float16 if plan.kind is Kind.F16 else np.float32).max
    numbers = chunk.float().numpy()
    if not max(numbers.max(), -numbers.min()) <= largest:  # NaN is not less than anything
        raise UserError(
            f"{plan.entry.native[0]} holds NaN or numbers above {largest:.0f}", "check the checkpoint's weights"
        )
    return ggml.quantize(numbers, plan.kind, importance)
