"""Open GGUF files written by this package, with every check that needs no reading of weights.

A file contains everything for inference: weights, tokenizer, prompt format. Opening it needs neither torch nor the
folder it was created from; `quantization/gguf_writer.py` writes it. The gguf library's own reader is not used: it takes
2.1 s for the 65,024 pieces of ChatGLM3's vocabulary.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.checkpoint.atomic_files import check_not_lfs_pointer
from entrypoints.checkpoint.config_values import LINEAR_ROPE
from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.checkpoint.tokenizer import Tokenizer, parse_tokenizer
from entrypoints.errors import UserError
from entrypoints.families import family_named
from entrypoints.untrusted import parse_json

ARCHITECTURE = "chatglm"
TOKENIZER_KEY = "glm.tokenizer_json"  # text of tokenizer.json; rebuilding it from pieces and scores would be slower
PROMPT_KEY = "glm.prompt_format"  # JSON, as in prompt.json
PROVENANCE_KEY = "glm.provenance"  # JSON, as in manifest.json
# supported types, smallest first -> value of general.file_type
GGUF_TYPES = {"q4_0": 2, "q4_k_m": 15, "q5_k_m": 17, "q8_0": 7, "f16": 1}
IMATRIX_TYPES = ("q4_0", "q4_k_m", "q5_k_m")  # types whose values depend on an importance matrix
MODEL_KEYS = {  # field of ModelConfig -> key of the metadata
    "num_layers": f"{ARCHITECTURE}.block_count",
    "hidden_size": f"{ARCHITECTURE}.embedding_length",
    "num_heads": f"{ARCHITECTURE}.attention.head_count",
    "num_kv_heads": f"{ARCHITECTURE}.attention.head_count_kv",
    "head_dim": f"{ARCHITECTURE}.attention.key_length",
    "intermediate_size": f"{ARCHITECTURE}.feed_forward_length",
    "vocab_size": "tokenizer.ggml.tokens",
    "context_length": f"{ARCHITECTURE}.context_length",
    "rms_norm_eps": f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon",
    "rope_theta": f"{ARCHITECTURE}.rope.freq_base",
}
LINEAR_ROPE_KEY = {"position_divisor": f"{ARCHITECTURE}.rope.scaling.factor"}  # present only if positions are divided
ROPE_TYPE_KEY = f"{ARCHITECTURE}.rope.scaling.type"
MAX_ENTRIES = 1_000_000  # values, tensors, and strings in an array; a sparse file has room for more than can be read
MAX_STRING_BYTES = 256 << 20
MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MIN_ENTRY_BYTES = 13  # of a value or a tensor in the header
MAX_DIMENSIONS = 4
STRING, ARRAY = 8, 9  # value types; the others are scalars
SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# llama.cpp aborts the process if two tokens are equal, and reads the other arrays without comparing type and length.
TOKENS_KEY = "tokenizer.ggml.tokens"
TOKEN_ARRAYS = {TOKENS_KEY: STRING, "tokenizer.ggml.token_type": 5}  # as long as the vocabulary
MERGES_KEY = "tokenizer.ggml.merges"
VOCABULARY_ARRAYS = {  # by tokenizer.ggml.model
    "llama": TOKEN_ARRAYS | {"tokenizer.ggml.scores": 6},
    "gpt2": TOKEN_ARRAYS,
}
VOCABULARY_NUMBERS = {  # the other keys of a vocabulary; llama.cpp has more, such as tables of characters to replace
    f"tokenizer.ggml.{name}"
    for name in (
        *("eos_token_id", "eot_token_id", "eom_token_id", "bos_token_id", "unknown_token_id", "padding_token_id"),
        *("add_bos_token", "add_eos_token", "add_space_prefix"),
    )
}
VOCABULARY_TEXTS = {"tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template", MERGES_KEY}
CREATE_AGAIN = "copy or create the file again"


@dataclass(frozen=True)
class GgufCheckpoint:
    """A validated file: its model configuration, tokenizer and the prompt format it was tuned with."""

    file: Path
    model_config: ModelConfig
    tokenizer: Tokenizer
    prompt_format: PromptFormat
    type: str  # of most weights: one of GGUF_TYPES, or llama.cpp's name of another type

    @property
    def context_length(self) -> int:
        """Tokens, prompt and answer together."""
        return self.model_config.context_length


def open_gguf(file: Path) -> GgufCheckpoint:
    """Check a file written by `glm quantize` and read everything except its weights.

    Raises UserError: it is missing, an LFS pointer, truncated, not GGUF, of another architecture, or lacks the metadata
    that only this package writes.
    """
    metadata = read_metadata(file, "give the path of a GGUF file written by glm quantize")
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        remedy = "create a file of ChatGLM3: glm quantize; an embedding model is served with glm serve --embeddings"
        raise UserError(f"{file} has architecture {architecture!r}", remedy)
    missing = [key for key in (TOKENIZER_KEY, PROMPT_KEY) if key not in metadata]
    if missing:
        raise UserError(
            f"{file} was created by another program: it lacks {', '.join(missing)}",
            "create it from a converted checkpoint: glm quantize DIR OUT.gguf",
        )
    try:
        prompt_format = PromptFormat(**parse_json(metadata[PROMPT_KEY], f"{PROMPT_KEY} of {file}", CREATE_AGAIN))
        return GgufCheckpoint(
            file=file,
            model_config=_read_model_config(metadata, file),
            tokenizer=parse_tokenizer(
                metadata[TOKENIZER_KEY], f"{TOKENIZER_KEY} of {file}", family_named(prompt_format.family)
            ),
            prompt_format=prompt_format,
            type=_type_name(metadata["general.file_type"]),
        )
    except KeyError as error:
        raise UserError(f"{file} lacks {error}", CREATE_AGAIN) from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} has invalid metadata ({error})", CREATE_AGAIN) from error


def _read_model_config(metadata: dict[str, Any], file: Path) -> ModelConfig:
    type_ = metadata.get(ROPE_TYPE_KEY)
    if type_ not in (None, LINEAR_ROPE):
        raise UserError(f"{file}: {ROPE_TYPE_KEY} is {type_!r:.40}, not {LINEAR_ROPE!r}", CREATE_AGAIN)
    return ModelConfig.from_numbers(metadata, MODEL_KEYS | (LINEAR_ROPE_KEY if type_ else {}), file)


def read_metadata(file: Path, remedy: str) -> dict[str, Any]:
    """Metadata of any GGUF file by key, an array as its length.

    Raises UserError: it is missing, an LFS pointer, truncated, or not GGUF; `remedy` says which file to give.
    """
    if not file.is_file():
        raise UserError(f"file not found: {file}", remedy)
    check_not_lfs_pointer(file)
    with file.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{file} is not a GGUF file", remedy)
        return _read_header(file, stream)


def _type_name(file_type: int) -> str:
    for name, known in GGUF_TYPES.items():
        if file_type == known:
            return name
    from gguf import LlamaFileType  # names of the types that llama.cpp's own quantizer writes

    return LlamaFileType(file_type).name.removeprefix("MOSTLY_").lower()


def _read_header(file: Path, stream: BinaryIO) -> dict[str, Any]:
    """Metadata by key. Raises UserError: a tensor lies outside the file."""
    reader = _Reader(file, stream)
    version = reader.uint32()
    if version != VERSION:
        raise UserError(f"{file} has GGUF version {version}", f"create a file of version {VERSION}: glm quantize")
    tensor_count, value_count = reader.uint64(), reader.uint64()
    if tensor_count + value_count > min(MAX_ENTRIES, reader.size // MIN_ENTRY_BYTES):
        raise UserError(
            f"{file} is truncated or damaged: {tensor_count} tensors and {value_count} values do not fit", CREATE_AGAIN
        )
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = reader.string()
        metadata[key] = reader.value(key, reader.uint32())
    _check_vocabulary(reader, metadata)
    ends = [reader.tensor_end() for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise reader.damaged(f"an alignment of {alignment!r}")
    start = -(-stream.tell() // alignment) * alignment
    expected = start + max(ends) if ends else 0
    if reader.size < expected:
        raise UserError(f"{file} is truncated: {reader.size} bytes, its header specifies {expected}", CREATE_AGAIN)
    return metadata


def _check_vocabulary(reader: "_Reader", metadata: dict[str, Any]) -> None:
    """Raises UserError: arrays of another type or length, or anything else that this package does not write."""
    if metadata.get("general.architecture") != ARCHITECTURE or not {TOKENIZER_KEY, TOKENS_KEY} <= metadata.keys():
        return  # reported by open_gguf
    arrays = VOCABULARY_ARRAYS.get(str(metadata.get("tokenizer.ggml.model")))
    known = (arrays or {}).keys() | VOCABULARY_NUMBERS | VOCABULARY_TEXTS
    other = [key for key in metadata if key.startswith("tokenizer.") and key not in known]
    if other or arrays is None:
        raise reader.damaged(f"another vocabulary ({', '.join(other) or 'tokenizer.ggml.model'})")
    size = metadata.get(TOKENS_KEY)
    wrong = [key for key, kind in arrays.items() if reader.arrays.get(key) != (kind, size)]
    if MERGES_KEY in metadata and reader.arrays.get(MERGES_KEY, (0, 0))[0] != STRING:
        wrong.append(MERGES_KEY)
    wrong += [key for key in VOCABULARY_NUMBERS & metadata.keys() if not isinstance(metadata[key], int)]
    if wrong:
        raise reader.damaged(f"{', '.join(sorted(wrong))} of another type or length")


class _Reader:
    """The primitives of the format, each checked against the end of the file."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self.size = file.stat().st_size
        self.arrays: dict[str, tuple[int, int]] = {}  # type of the values and length
        self._file = file
        self._stream = stream

    def uint32(self) -> int:
        return int.from_bytes(self._take(4), "little")

    def uint64(self) -> int:
        return int.from_bytes(self._take(8), "little")

    def string(self) -> str:
        length = self.uint64()
        if length > MAX_STRING_BYTES:
            raise self.damaged(f"a string of {length} bytes")
        return self._take(length).decode("utf-8", "replace")

    def value(self, key: str, kind: int) -> int | float | bool | str:
        """A value of the given type; of an array only its length. Raises UserError: two tokens are equal."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self._skip_array(key)
        if kind not in SCALAR_FORMATS:
            raise self.damaged(f"a value of type {kind}")
        format_ = f"<{SCALAR_FORMATS[kind]}"
        scalar: int | float | bool = struct.unpack(format_, self._take(struct.calcsize(format_)))[0]
        return scalar

    def tensor_end(self) -> int:
        """Read the description of a tensor; returns where its data ends, relative to the start of all data."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name, dimensions = self.string(), self.uint32()
        if dimensions > MAX_DIMENSIONS:
            raise self.damaged(f"{dimensions} dimensions for {name[:60]!r}")
        count = math.prod([self.uint64() for _ in range(dimensions)])
        kind, offset = self.uint32(), self.uint64()
        try:
            block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (KeyError, ValueError):
            raise self.damaged(f"a tensor of type {kind}") from None
        return offset + count // block_size * block_bytes

    def damaged(self, problem: str) -> UserError:
        return UserError(f"{self._file} is damaged: it has {problem}", CREATE_AGAIN)

    def _skip_array(self, key: str) -> int:
        kind, length = self.uint32(), self.uint64()
        self.arrays[key] = (kind, length)
        if kind in SCALAR_FORMATS:
            self._skip(length * struct.calcsize(f"<{SCALAR_FORMATS[kind]}"))
        elif kind == STRING and length <= MAX_ENTRIES and key == TOKENS_KEY:
            if len({self._take(self.uint64()) for _ in range(length)}) < length:
                raise self.damaged("the same token twice")
        elif kind == STRING and length <= MAX_ENTRIES:
            for _ in range(length):
                self._skip(self.uint64())
        else:
            raise self.damaged(f"an array of {length} values of type {kind}")
        return length

    def _skip(self, length: int) -> None:
        self._require(length)
        self._stream.seek(length, os.SEEK_CUR)

    def _take(self, length: int) -> bytes:
        self._require(length)
        return self._stream.read(length)

    def _require(self, length: int) -> None:
        if self._stream.tell() + length > self.size:
            raise UserError(f"{self._file} is truncated: its header does not fit in {self.size} bytes", CREATE_AGAIN)
