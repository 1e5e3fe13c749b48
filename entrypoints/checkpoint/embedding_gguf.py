"""Open the GGUF file of an embedding model, with every check that needs no reading of weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrypoints.checkpoint.config_numbers import MODEL_RANGES, Range, read_number
from entrypoints.checkpoint.gguf_reader import read_metadata
from entrypoints.errors import UserError

REMEDY = "give the GGUF file of an embedding model such as bge, which llama.cpp's convert_hf_to_gguf.py writes"
POOLING_TYPES = {1: "mean", 2: "cls", 3: "last"}
POOLING_RANGE = Range(0, 4)  # 0: none, 4: rank
FLOAT16_BYTES = 2


@dataclass(frozen=True)
class EmbeddingCheckpoint:
    """A validated file. `cache_bytes`: KV cache of one token; 0 for an encoder, which has none."""

    file: Path
    architecture: str
    pooling: str
    context_length: int
    size: int  # of a vector
    vocab_size: int
    cache_bytes: int

    @property
    def is_causal(self) -> bool:
        """Whether the model is a decoder."""
        return self.cache_bytes > 0


def open_embedding_gguf(file: Path) -> EmbeddingCheckpoint:
    """Check a GGUF file of any architecture.

    Raises UserError: `read_metadata` rejects it, or it declares no pooling, as chat models do.
    """
    metadata = read_metadata(file, REMEDY)
    architecture = metadata.get("general.architecture")
    try:
        if _number(metadata, f"{architecture}.pooling_type", POOLING_RANGE, file) not in POOLING_TYPES:
            raise KeyError
    except KeyError:
        raise UserError(f"{file} ({architecture}) declares no pooling to a vector", REMEDY) from None
    try:
        return EmbeddingCheckpoint(
            file=file,
            architecture=str(architecture),
            pooling=POOLING_TYPES[metadata[f"{architecture}.pooling_type"]],
            context_length=_number(metadata, f"{architecture}.context_length", MODEL_RANGES["context_length"], file),
            size=_number(metadata, f"{architecture}.embedding_length", MODEL_RANGES["hidden_size"], file),
            vocab_size=_number(metadata, "tokenizer.ggml.tokens", MODEL_RANGES["vocab_size"], file),
            cache_bytes=_cache_bytes(metadata, f"{architecture}.", file),
        )
    except KeyError as error:
        raise UserError(f"{file} lacks {error}", "copy or convert the file again") from error


def _cache_bytes(metadata: dict[str, Any], prefix: str, file: Path) -> int:
    if metadata.get(f"{prefix}attention.causal") is False:
        return 0
    layers = _number(metadata, f"{prefix}block_count", MODEL_RANGES["num_layers"], file)
    heads = _number(metadata, f"{prefix}attention.head_count", MODEL_RANGES["num_heads"], file)
    size = _number(metadata, f"{prefix}embedding_length", MODEL_RANGES["hidden_size"], file)
    kv_heads, key_length = (
        _number({name: default} | metadata, name, MODEL_RANGES[field], file)
        for name, default, field in (
            (f"{prefix}attention.head_count_kv", heads, "num_kv_heads"),
            (f"{prefix}attention.key_length", max(1, size // heads), "head_dim"),
        )
    )
    return 2 * layers * kv_heads * key_length * FLOAT16_BYTES


def _number(metadata: dict[str, Any], key: str, limits: Range, file: Path) -> int:
    value: int = read_number(metadata, key, limits, file)
    return value
