"""Both ways between the original layout and the native one, tensor by tensor, in bounded memory."""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from entrypoints.checkpoint import native
from entrypoints.checkpoint.files import require_space, written_beside
from entrypoints.checkpoint.layout import ROTARY, Shape, tensors
from entrypoints.checkpoint.manifest import write_manifest
from entrypoints.checkpoint.original import TensorFiles, open_tensors, read_json
from entrypoints.checkpoint.tokenizer import VOCABULARY_FILE, Tokenizer, convert_vocabulary
from entrypoints.errors import UserError
from entrypoints.prompt import PromptFormat

logger = logging.getLogger(__name__)
SHARD_BYTES = 1 << 30  # what is written at once bounds the memory
DTYPES = ("keep", "float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Part:
    """One tensor to write: rows `start:stop` of a stored one, or several stored ones joined by rows."""

    name: str
    sources: tuple[str, ...]
    start: int | None = None
    stop: int | None = None


def convert_to_native(
    source: Path, target: Path, prompt_format: PromptFormat, dtype: str = "keep", overwrite: bool = False
) -> None:
    """Turn an original ChatGLM3 folder into one that plain transformers loads.

    Everything is checked first; the result appears at `target` whole or not at all. dtype: one of DTYPES.
    Raises UserError naming the file, tensor or field that stands in the way.
    """
    if not source.is_dir():
        raise UserError(f"{source} is no folder", "name the folder of a ChatGLM3 checkpoint")
    shape = Shape.from_original(read_json(source / "config.json"), source / "config.json")
    backend = convert_vocabulary(source / VOCABULARY_FILE)
    stored = open_tensors(source)
    stored.check({entry.original: entry.shape for entry in tensors(shape)}, optional=frozenset({ROTARY}))
    tokenizer = Tokenizer(backend)
    if tokenizer.size > shape.vocabulary:
        raise UserError(
            f"{source / VOCABULARY_FILE} has {tokenizer.size} ids, config.json {shape.vocabulary}",
            "use the vocabulary of this checkpoint",
        )
    with written_beside(target, overwrite) as folder:
        require_space(folder, _size(stored, dtype))
        kept = _write_weights(stored, _native_parts(shape), folder, dtype)
        native.save_tokenizer(folder, backend)
        shutil.copyfile(source / VOCABULARY_FILE, folder / VOCABULARY_FILE)
        native.write_settings(folder, shape, kept, tokenizer, prompt_format)
        write_manifest(folder, {"made_by": "glm convert", "source": source.resolve().name, **_download(source)})


def convert_to_original(source: Path, target: Path, dtype: str = "keep", overwrite: bool = False) -> None:
    """Write a native folder back in the original layout, for the original code; equal tensor for tensor.

    The model's own Python files are not written: the original repository has them.
    """
    checkpoint = native.open_native(source)
    vocabulary = source / VOCABULARY_FILE
    if not vocabulary.is_file():
        raise UserError(f"{source} holds no {VOCABULARY_FILE}", "copy it there from the original checkpoint")
    with written_beside(target, overwrite) as folder:
        require_space(folder, _size(checkpoint.files, dtype))
        parts = [Part(entry.original, entry.native) for entry in tensors(checkpoint.shape)]
        kept = _write_weights(checkpoint.files, parts, folder, dtype, _inverse_frequencies(checkpoint.shape))
        shutil.copyfile(vocabulary, folder / VOCABULARY_FILE)
        native.write_json(folder / "config.json", checkpoint.shape.original_config(kept))
        native.write_json(folder / "generation_config.json", {"eos_token_id": 2, "pad_token_id": 0})
        native.write_json(
            folder / "tokenizer_config.json",
            {
                "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
                "do_lower_case": False,
                "remove_space": False,
                "tokenizer_class": "ChatGLMTokenizer",
            },
        )
        write_manifest(folder, {"made_by": "glm convert --to original", "source": source.resolve().name})


def write_native(
    checkpoint: native.NativeCheckpoint,
    stored: TensorFiles,
    folder: Path,
    dtype: str = "keep",
    change: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Write native tensors anew into a native folder, all but its manifest; `change` may alter each of them.

    checkpoint: whose shape, vocabulary and prompt format the folder gets.
    """
    require_space(folder, _size(stored, dtype))
    parts = [Part(name, (name,)) for name in stored.tensors]
    kept = _write_weights(stored, parts, folder, dtype, change=change)
    native.copy_vocabulary(checkpoint.folder, folder)
    native.write_settings(folder, checkpoint.shape, kept, checkpoint.tokenizer, checkpoint.prompt_format)


def _native_parts(shape: Shape) -> list[Part]:
    parts = []
    for entry in tensors(shape):
        start = 0
        for name, rows in zip(entry.native, entry.rows, strict=True):
            parts.append(Part(name, (entry.original,), start, start + rows))
            start += rows
    return parts


def _write_weights(
    stored: TensorFiles,
    parts: list[Part],
    folder: Path,
    dtype: str,
    extra: Callable[[torch.dtype], dict] | None = None,
    change: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> str:
    """Write safetensors shards, grouped by the file they come from, and their index; returns the dtype's name."""
    as_dtype = None if dtype == "keep" else getattr(torch, dtype)
    shards = list(_shards(stored, parts, as_dtype))
    weight_map, total, written_dtype = {}, 0, torch.float16
    with tqdm(total=_size(stored, dtype), unit="B", unit_scale=True, desc="weights", disable=None) as bar:
        for number, shard in enumerate(shards, start=1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            data = _read(stored, shard, as_dtype, change)
            written_dtype = next(iter(data.values())).dtype
            if extra and number == len(shards):
                data |= extra(written_dtype)
            native.save_tensors(data, folder / name)
            weight_map |= dict.fromkeys(data, name)
            size = sum(tensor.nbytes for tensor in data.values())
            total += size
            bar.update(size)
            del data
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        native.write_json(folder / "model.safetensors.index.json", index)
    return str(written_dtype).removeprefix("torch.")


def _shards(stored: TensorFiles, parts: Iterable[Part], as_dtype: torch.dtype | None) -> Iterator[list[Part]]:
    """Group parts into shards of at most SHARD_BYTES, reading one source file at a time where that is possible."""
    shard, size = [], 0
    for part in sorted(parts, key=lambda part: stored.tensors[part.sources[0]].file.name):
        first = stored.tensors[part.sources[0]]
        rows = (
            sum(stored.tensors[name].shape[0] for name in part.sources) if part.stop is None else part.stop - part.start
        )
        bytes_ = rows * torch.Size(first.shape[1:]).numel() * (as_dtype or first.dtype).itemsize
        if shard and size + bytes_ > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(part)
        size += bytes_
    yield shard


def _read(
    stored: TensorFiles,
    shard: list[Part],
    as_dtype: torch.dtype | None,
    change: Callable[[str, torch.Tensor], torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    needed = {stored.tensors[name].file for part in shard for name in part.sources}
    mapped = {name: tensor for file in needed for name, tensor in stored.of_file(file).items()}
    data = {}
    for part in shard:
        sources = [mapped[name] for name in part.sources]
        tensor = sources[0][part.start : part.stop] if len(sources) == 1 else torch.cat(sources)
        kept = as_dtype or tensor.dtype
        tensor = change(part.name, tensor) if change else tensor
        data[part.name] = tensor.to(kept).contiguous()
    return data


def _inverse_frequencies(shape: Shape) -> Callable[[torch.dtype], dict[str, torch.Tensor]]:
    """The buffer the original model stores, computed as its code does, in the checkpoint's own precision."""

    def make(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        half = shape.head_dim // 2
        return {ROTARY: 1.0 / (10000 ** (torch.arange(0, half, 2).to(dtype) / half))}

    return make


def _size(stored: TensorFiles, dtype: str) -> int:
    if dtype == "keep":
        return stored.size
    return (
        sum(tensor.size // tensor.dtype.itemsize for tensor in stored.tensors.values()) * getattr(torch, dtype).itemsize
    )


def _download(source: Path) -> dict:
    record = source / "download.json"
    return {"download": read_json(record)} if record.is_file() else {}
