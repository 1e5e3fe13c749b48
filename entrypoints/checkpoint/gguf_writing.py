"""Write a converted checkpoint as one GGUF file, which llama.cpp runs: whole, or quantised to 8 or 4 bits.

Norms and biases stay float32. With q4_0 the embedding and the output layer get 8 bits: every error of the one enters
all layers, every error of the other goes straight into the choice of the token; it costs 0.27 GB of the 6B's 3.8.
A tensor whose rows are no multiple of a block of 32 stays float16.
"""

import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from tqdm import tqdm

from entrypoints.checkpoint.adapters import CONFIG_FILE, is_adapter
from entrypoints.checkpoint.files import file_written_beside, require_space
from entrypoints.checkpoint.gguf import ARCHITECTURE, PROMPT_KEY, PROVENANCE_KEY, TOKENIZER_KEY, TYPES
from entrypoints.checkpoint.layout import Entry, Shape, tensors
from entrypoints.checkpoint.manifest import MANIFEST_FILE, read_manifest
from entrypoints.checkpoint.native import NativeCheckpoint, open_native
from entrypoints.checkpoint.original import TensorFiles, read_json
from entrypoints.checkpoint.tokenizer import TOKENIZER_FILE, VOCABULARY_FILE, Tokenizer
from entrypoints.errors import UserError
from entrypoints.prompt import CONTROL_TOKENS
from entrypoints.sampling import Sampling

logger = logging.getLogger(__name__)
CHUNK_NUMBERS = 1 << 24  # converted at once; with the finished tensor this bounds the memory
SMALL_BYTES = 32 << 20  # metadata is less than this
EIGHT_BITS = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class Plan:
    """One tensor of the file: its name, where its rows come from, and how it is stored."""

    name: str
    entry: Entry
    kind: Kind

    @property
    def size(self) -> int:
        """Bytes of its data."""
        per_block, bytes_ = gguf.GGML_QUANT_SIZES[self.kind]
        return torch.Size(self.entry.shape).numel() // per_block * bytes_


def write_gguf(folder: Path, target: Path, type_: str) -> int:
    """Write `target` from a converted folder, whole or not at all; returns its size in bytes. type_: one of TYPES.

    Raises UserError when the folder is no whole converted model, the target exists, or the disk is too small.
    """
    if target.suffix != ".gguf":
        raise UserError(f"{target} does not end in .gguf", "name it so: that is how it is recognised")
    _refuse_adapters(folder)
    checkpoint = open_native(folder)
    vocabulary = _vocabulary(folder, checkpoint.tokenizer, checkpoint.shape.vocabulary)
    plans = _plans(checkpoint.shape, type_)
    with file_written_beside(target) as partial:
        require_space(target.parent, sum(plan.size for plan in plans) + SMALL_BYTES)
        writer = gguf.GGUFWriter(None, ARCHITECTURE)
        try:
            _describe(writer, checkpoint, type_)
            _add_vocabulary(writer, checkpoint, vocabulary)
            for plan in plans:
                writer.add_tensor_info(plan.name, plan.entry.shape, np.dtype(np.float32), plan.size, plan.kind)
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            _write_tensors(writer, checkpoint.files, plans)
        finally:
            writer.close()
    return target.stat().st_size


def _refuse_adapters(folder: Path) -> None:
    if not is_adapter(folder):
        return
    config_file = folder / CONFIG_FILE
    lora = config_file.is_file() and read_json(config_file).get("peft_type") == "LORA"
    if lora:
        raise UserError(f"{folder} is a LoRA adapter, no whole model", "merge it into its base model first")
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


def _plans(shape: Shape, type_: str) -> list[Plan]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.CHATGLM, shape.layers)
    plans = []
    for entry in tensors(shape):
        name = names.get_name(entry.original.removeprefix("transformer."), (".weight", ".bias"))
        plans.append(Plan(name, entry, _kind(name, entry, type_)))
    return plans


def _kind(name: str, entry: Entry, type_: str) -> Kind:
    if not entry.columns:
        return Kind.F32
    wanted = Kind.Q8_0 if type_ == "q4_0" and name in EIGHT_BITS else Kind[type_.upper()]
    per_block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return Kind.F16 if entry.columns[0] % per_block else wanted


def _describe(writer: gguf.GGUFWriter, checkpoint: NativeCheckpoint, type_: str) -> None:
    shape, folder, default = checkpoint.shape, checkpoint.folder, Sampling()
    manifest = read_manifest(folder)["provenance"] if (folder / MANIFEST_FILE).is_file() else {}
    provenance = {"made_by": "glm quantize", "type": type_, "source": folder.resolve().name, "source_made": manifest}
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


def _write_tensors(writer: gguf.GGUFWriter, stored: TensorFiles, plans: list[Plan]) -> None:
    with tqdm(total=sum(plan.size for plan in plans), unit="B", unit_scale=True, desc="weights", disable=None) as bar:
        for plan in plans:
            # mapped anew for each tensor: what was read stays in this process's memory as long as the mapping does
            files = {stored.tensors[name].file for name in plan.entry.native}
            mapped = {name: tensor for file in files for name, tensor in stored.of_file(file).items()}
            writer.write_tensor_data(_quantised(plan, [mapped[name] for name in plan.entry.native]))
            bar.update(plan.size)


def _quantised(plan: Plan, sources: list[torch.Tensor]) -> np.ndarray:
    """The finished tensor, made some rows at a time."""
    parts, done = _parts(plan, sources), 0
    first = next(parts)
    data = np.empty((plan.entry.shape[0], *first.shape[1:]), first.dtype)  # np.concatenate would hold it twice
    for part in itertools.chain([first], parts):
        data[done : done + len(part)] = part
        done += len(part)
    return data


def _parts(plan: Plan, sources: list[torch.Tensor]) -> Iterator[np.ndarray]:
    largest = np.finfo(np.float16 if plan.kind is Kind.F16 else np.float32).max
    rows = max(1, CHUNK_NUMBERS // torch.Size(plan.entry.columns).numel())
    for source in sources:
        for chunk in source.split(rows):
            numbers = chunk.float().numpy()
            if not np.abs(numbers).max() <= largest:  # NaN is not less than anything
                raise UserError(
                    f"{plan.entry.native[0]} holds NaN or numbers above {largest:.0f}", "check the checkpoint's weights"
                )
            yield gguf.quantize(numbers, plan.kind)
