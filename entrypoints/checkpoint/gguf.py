"""GGUF files of this product: the names inside, and how one is opened with every check that costs no reading.

A file holds all that answering needs: weights, tokenizer, prompt format. Opening needs neither torch nor the folder it
was made from; writing is `gguf_writing.py`. The gguf library's own reader takes 2.1 s for ChatGLM3's 65,024 pieces.
"""

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from entrypoints.checkpoint.files import refuse_lfs_pointer
from entrypoints.checkpoint.layout import Shape
from entrypoints.checkpoint.tokenizer import Tokenizer, parse_tokenizer
from entrypoints.errors import UserError
from entrypoints.prompt import PromptFormat

ARCHITECTURE = "chatglm"
TOKENIZER_KEY = "glm.tokenizer_json"  # the text of tokenizer.json: rebuilding it from pieces and scores would be slower
PROMPT_KEY = "glm.prompt_format"  # JSON, as prompt.json
PROVENANCE_KEY = "glm.provenance"  # JSON, as in manifest.json
# smallest first, and what general.file_type calls them
TYPES = {"q4_0": 2, "q4_k_m": 15, "q5_k_m": 17, "q8_0": 7, "f16": 1}
WEIGHED = ("q4_0", "q4_k_m", "q5_k_m")  # types that an importance matrix changes
MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
LEAST_ENTRY = 13  # bytes that a value or a tensor takes in the header
MOST_DIMENSIONS = 4
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
AGAIN = "copy or make the file again"


@dataclass(frozen=True)
class GgufCheckpoint:
    """A checked file: what the model is, its tokenizer and the prompt format it was taught."""

    file: Path
    shape: Shape
    tokenizer: Tokenizer
    prompt_format: PromptFormat
    type: str  # of most weights: q4_0, q8_0, f16, or what llama.cpp's own tools call it

    @property
    def window(self) -> int:
        """Tokens of prompt and answer together."""
        return self.shape.window


def open_gguf(file: Path) -> GgufCheckpoint:
    """Check a file made by `glm quantize` and read all of it but the weights.

    Raises UserError when it is missing, an LFS pointer, truncated, no GGUF, of another architecture, or lacks what
    only this product writes.
    """
    if not file.is_file():
        raise UserError(f"{file} is no file", "name a GGUF file made by glm quantize")
    refuse_lfs_pointer(file)
    with file.open("rb") as stream:
        metadata = _read(file, stream)
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise UserError(f"{file} holds a model of architecture {architecture!r}", "make one of ChatGLM3: glm quantize")
    missing = [key for key in (TOKENIZER_KEY, PROMPT_KEY) if key not in metadata]
    if missing:
        raise UserError(
            f"{file} was made by another program: it lacks {', '.join(missing)}",
            "make it from a converted checkpoint: glm quantize DIR OUT.gguf",
        )
    try:
        return GgufCheckpoint(
            file=file,
            shape=_shape(metadata),
            tokenizer=parse_tokenizer(metadata[TOKENIZER_KEY], f"{TOKENIZER_KEY} of {file}"),
            prompt_format=PromptFormat(**json.loads(metadata[PROMPT_KEY])),
            type=_type_name(metadata["general.file_type"]),
        )
    except KeyError as error:
        raise UserError(f"{file} lacks {error}", AGAIN) from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} is not understood ({error})", AGAIN) from error


def _shape(metadata: dict) -> Shape:
    def number(name: str) -> int | float:
        return metadata[f"{ARCHITECTURE}.{name}"]

    return Shape(
        layers=number("block_count"),
        hidden=number("embedding_length"),
        heads=number("attention.head_count"),
        groups=number("attention.head_count_kv"),
        head_dim=number("attention.key_length"),
        ffn=number("feed_forward_length"),
        vocabulary=metadata["tokenizer.ggml.tokens"],
        window=number("context_length"),
        norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_ratio=number("rope.freq_base") / 10000,
    )


def _type_name(number: int) -> str:
    for name, known in TYPES.items():
        if number == known:
            return name
    from gguf import LlamaFileType  # names of the types that llama.cpp's own quantiser knows

    return LlamaFileType(number).name.removeprefix("MOSTLY_").lower()


def _read(file: Path, stream: BinaryIO) -> dict:
    """Metadata by key, an array as its length; checks that every tensor lies inside the file."""
    head = stream.read(len(MAGIC))
    if head != MAGIC:
        raise UserError(f"{file} is no GGUF file", "name a file made by glm quantize")
    reader = _Reader(file, stream)
    version = reader.scalar("I")
    if version != VERSION:
        raise UserError(f"{file} is of GGUF version {version}", f"version {VERSION} is needed: glm quantize")
    tensors, pairs = reader.scalar("Q"), reader.scalar("Q")
    if (tensors + pairs) * LEAST_ENTRY > reader.size:
        raise UserError(
            f"{file} is truncated or damaged: it has no room for {tensors} tensors and {pairs} values", AGAIN
        )
    metadata = {}
    for _ in range(pairs):
        key = reader.string()
        metadata[key] = reader.value(reader.scalar("I"))
    ends = [reader.tensor_end() for _ in range(tensors)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise reader.damaged(f"an alignment of {alignment!r}")
    start = -(-stream.tell() // alignment) * alignment
    expected = start + max(ends) if ends else 0
    if reader.size < expected:
        raise UserError(f"{file} is truncated: {reader.size} bytes, its header says {expected}", AGAIN)
    return metadata


class _Reader:
    """The primitives of the format, each checked against the end of the file."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self.size = file.stat().st_size
        self._file = file
        self._stream = stream

    def scalar(self, code: str) -> int | float | bool:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        return self._take(self.scalar("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> int | float | bool | str:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self._skip_array()
        if kind not in SCALARS:
            raise self.damaged(f"a value of kind {kind}")
        return self.scalar(SCALARS[kind])

    def tensor_end(self) -> int:
        """Where the next described tensor's data ends, counted from the start of all data."""
        from gguf import GGML_QUANT_SIZES

        name, dimensions = self.string(), self.scalar("I")
        if dimensions > MOST_DIMENSIONS:
            raise self.damaged(f"{dimensions} dimensions for {name[:60]!r}")
        numbers = math.prod(self.scalar("Q") for _ in range(dimensions))
        kind, offset = self.scalar("I"), self.scalar("Q")
        if kind not in GGML_QUANT_SIZES:
            raise self.damaged(f"a tensor of kind {kind}")
        per_block, bytes_ = GGML_QUANT_SIZES[kind]
        return offset + numbers // per_block * bytes_

    def damaged(self, what: str) -> UserError:
        return UserError(f"{self._file} is damaged: it has {what}", AGAIN)

    def _skip_array(self) -> int:
        kind, length = self.scalar("I"), self.scalar("Q")
        if kind in SCALARS:
            self._skip(length * struct.calcsize(f"<{SCALARS[kind]}"))
        elif kind == STRING:
            for _ in range(length):
                self._skip(self.scalar("Q"))
        else:
            raise self.damaged(f"a list of kind {kind}")
        return length

    def _skip(self, length: int) -> None:
        self._require(length)
        self._stream.seek(length, os.SEEK_CUR)

    def _take(self, length: int) -> bytes:
        self._require(length)
        return self._stream.read(length)

    def _require(self, length: int) -> None:
        if self._stream.tell() + length > self.size:
            raise UserError(f"{self._file} is truncated: its header does not fit in {self.size} bytes", AGAIN)
