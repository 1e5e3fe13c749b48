"""Conversion between the original layout and the native one, tensor by tensor, in bounded memory."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.checkpoint import native
from entrypoints.checkpoint.atomic_files import atomic_folder, require_disk_space
from entrypoints.checkpoint.family_evidence import identify_family
from entrypoints.checkpoint.layout import ROTARY_BUFFER, ModelConfig, tensor_mappings
from entrypoints.checkpoint.manifest import write_manifest
from entrypoints.checkpoint.original_config import check_original_values, original_config, original_token_ids
from entrypoints.checkpoint.tensor_files import WeightFiles, open_weight_files, read_json
from entrypoints.checkpoint.tokenizer import VOCABULARY_FILE, Tokenizer, convert_vocabulary
from entrypoints.errors import UserError
from entrypoints.families import family_named
from entrypoints.file_writing import write_json

SHARD_BYTES = 1 << 30  # one shard is in memory at a time
DTYPES = ("keep", "float16", "bfloat16", "float32")

TensorChange = Callable[[str, torch.Tensor], torch.Tensor]  # (native name, tensor) -> tensor of the same shape


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write: rows `start:stop` of one stored tensor, or several ones concatenated along their rows."""

    name: str
    sources: tuple[str, ...]
    rows: tuple[int, int] | None = None  # start, stop

    def row_count(self, stored: WeightFiles) -> int:
        """Rows of the tensor to write."""
        if self.rows:
            return self.rows[1] - self.rows[0]
        return sum(stored.tensors[name].shape[0] for name in self.sources)


@dataclass(frozen=True)
class WriteOptions:
    """How tensors are written: precision, a change of each tensor, and tensors added to the last shard."""

    dtype: str = "keep"  # one of DTYPES
    change: TensorChange | None = None
    extra: Callable[[torch.dtype], dict[str, torch.Tensor]] | None = None

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None: every tensor keeps its own."""
        return _torch_dtype(self.dtype)


def convert_to_native(
    source: Path, target: Path, prompt_format: PromptFormat, dtype: str = "keep", overwrite: bool = False
) -> None:
    """Convert an original ChatGLM3 folder to one that plain transformers loads.

    Everything is checked before writing; `target` appears atomically. dtype: one of DTYPES.
    Raises UserError naming the file, tensor or field that prevents the conversion.
    """
    config = _original_config(source)
    family = identify_family(source, config, prompt_format.family)
    model_config = ModelConfig.from_original(config, source / "config.json", family.rope_ratio_scales)
    backend = convert_vocabulary(source / VOCABULARY_FILE, family)
    stored = open_weight_files(source)
    expected = {mapping.original: mapping.shape for mapping in tensor_mappings(model_config)}
    stored.check_shapes(expected, optional=frozenset({ROTARY_BUFFER}))
    tokenizer = Tokenizer(backend, family)
    if tokenizer.size > model_config.vocab_size:
        raise UserError(
            f"{source / VOCABULARY_FILE} has {tokenizer.size} ids, config.json {model_config.vocab_size}",
            "use the vocabulary of this checkpoint",
        )
    with atomic_folder(target, overwrite) as folder:
        require_disk_space(folder, output_bytes(stored, dtype))
        written_dtype = _write_weights(stored, _native_tensors(model_config), folder, WriteOptions(dtype))
        native.save_tokenizer(folder, backend)
        shutil.copyfile(source / VOCABULARY_FILE, folder / VOCABULARY_FILE)
        native.write_config_files(folder, model_config, written_dtype, tokenizer, prompt_format)
        provenance = {"made_by": "glm convert", "source": source.resolve().name, **_download_record(source)}
        write_manifest(folder, provenance)


def original_format(source: Path, family: str | None = None, template: str | None = None) -> PromptFormat:
    """The prompt format of an original folder. family, template: if not None, those that it must have.

    Raises UserError: they do not name it, or `family` is another one than that of its files.
    """
    return PromptFormat.of(identify_family(source, _original_config(source), family), template)


def _original_config(source: Path) -> dict[str, Any]:
    if not source.is_dir():
        raise UserError(f"folder not found: {source}", "give the path of a ChatGLM3 checkpoint")
    config = read_json(source / "config.json")
    check_original_values(config, source / "config.json")
    return config


def convert_to_original(source: Path, target: Path, dtype: str = "keep", overwrite: bool = False) -> None:
    """Convert a native folder back to the original layout, for the original code; every tensor is bit-exact.

    The original repository's Python files are not written. Raises UserError.
    """
    checkpoint = native.open_native(source)
    vocabulary = source / VOCABULARY_FILE
    if not vocabulary.is_file():
        raise UserError(f"{source} contains no {VOCABULARY_FILE}", "copy it there from the original checkpoint")
    options = WriteOptions(dtype, extra=_rotary_buffer(checkpoint.model_config))
    tensors = [OutputTensor(mapping.original, mapping.native) for mapping in tensor_mappings(checkpoint.model_config)]
    with atomic_folder(target, overwrite) as folder:
        require_disk_space(folder, output_bytes(checkpoint.files, dtype))
        written_dtype = _write_weights(checkpoint.files, tensors, folder, options)
        shutil.copyfile(vocabulary, folder / VOCABULARY_FILE)
        family = family_named(checkpoint.prompt_format.family)
        write_json(
            folder / "config.json",
            original_config(checkpoint.model_config, written_dtype, family)
            | original_token_ids(family, checkpoint.tokenizer),
        )
        _write_tokenizer_configs(folder, checkpoint.tokenizer)
        write_manifest(folder, {"made_by": "glm convert --to original", "source": source.resolve().name})


def write_native_folder(
    checkpoint: native.NativeCheckpoint,
    stored: WeightFiles,
    folder: Path,
    dtype: str = "keep",
    change: TensorChange | None = None,
) -> None:
    """Write native tensors and all other files of a native folder, except its manifest.

    checkpoint: provides model configuration, vocabulary and prompt format. stored: the tensors to write.
    change: applied to each of them.
    """
    require_disk_space(folder, output_bytes(stored, dtype))
    written_dtype = _write_weights(stored, copied_tensors(stored), folder, WriteOptions(dtype, change))
    native.copy_vocabulary(checkpoint.folder, folder)
    native.write_config_files(
        folder, checkpoint.model_config, written_dtype, checkpoint.tokenizer, checkpoint.prompt_format
    )


def copied_tensors(stored: WeightFiles) -> list[OutputTensor]:
    """Every stored tensor under its own name."""
    return [OutputTensor(name, (name,)) for name in stored.tensors]


def write_weights(stored: WeightFiles, tensors: list[OutputTensor], folder: Path, dtype: str) -> str:
    """Write safetensors shards and their index, in `dtype`, one of DTYPES. Returns the dtype's name, `float16`."""
    return _write_weights(stored, tensors, folder, WriteOptions(dtype))


def _native_tensors(model_config: ModelConfig) -> list[OutputTensor]:
    tensors = []
    for mapping in tensor_mappings(model_config):
        start = 0
        for name, rows in zip(mapping.native, mapping.rows, strict=True):
            tensors.append(OutputTensor(name, (mapping.original,), (start, start + rows)))
            start += rows
    return tensors


def _write_tokenizer_configs(folder: Path, tokenizer: Tokenizer) -> None:
    family = tokenizer.family
    write_json(folder / "generation_config.json", original_token_ids(family, tokenizer))
    write_json(
        folder / "tokenizer_config.json",
        {
            "auto_map": {"AutoTokenizer": [f"tokenization_chatglm.{family.tokenizer_class}", None]},
            "do_lower_case": False,
            "remove_space": False,
            "tokenizer_class": family.tokenizer_class,
        },
    )


def _write_weights(stored: WeightFiles, tensors: list[OutputTensor], folder: Path, options: WriteOptions) -> str:
    """Write safetensors shards, grouped by source file, and their index. Returns the dtype's name, `float16`."""
    shards = list(_shards(stored, tensors, options.torch_dtype))
    weight_map: dict[str, str] = {}
    total, written_dtype = 0, torch.float16
    with tqdm(
        total=output_bytes(stored, options.dtype), unit="B", unit_scale=True, desc="weights", disable=None
    ) as bar:
        for number, shard in enumerate(shards, start=1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            data = _read_shard(stored, shard, options)
            written_dtype = next(iter(data.values())).dtype
            if options.extra and number == len(shards):
                data |= options.extra(written_dtype)
            native.save_tensors(data, folder / name)
            weight_map |= dict.fromkeys(data, name)
            size = sum(tensor.nbytes for tensor in data.values())
            total += size
            bar.update(size)
            del data  # before the next shard is read
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    return str(written_dtype).removeprefix("torch.")


def _shards(
    stored: WeightFiles, tensors: Iterable[OutputTensor], dtype: torch.dtype | None
) -> Iterator[list[OutputTensor]]:
    """Group tensors into shards of at most SHARD_BYTES, one source file after another where possible."""
    shard: list[OutputTensor] = []
    size = 0
    for tensor in sorted(tensors, key=lambda tensor: stored.tensors[tensor.sources[0]].file.name):
        first = stored.tensors[tensor.sources[0]]
        columns = torch.Size(first.shape[1:]).numel()
        tensor_bytes = tensor.row_count(stored) * columns * (dtype or first.dtype).itemsize
        if shard and size + tensor_bytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor_bytes
    yield shard


def _read_shard(stored: WeightFiles, shard: list[OutputTensor], options: WriteOptions) -> dict[str, torch.Tensor]:
    files = {stored.tensors[name].file for output in shard for name in output.sources}
    mapped = {name: tensor for file in files for name, tensor in stored.load_file(file).items()}
    data = {}
    for output in shard:
        sources = [mapped[name] for name in output.sources]
        tensor = sources[0] if len(sources) == 1 else torch.cat(sources)
        if output.rows:
            tensor = tensor[slice(*output.rows)]
        dtype = options.torch_dtype or tensor.dtype
        if options.change:
            tensor = options.change(output.name, tensor)
        data[output.name] = tensor.to(dtype).contiguous()
    return data


def _rotary_buffer(model_config: ModelConfig) -> Callable[[torch.dtype], dict[str, torch.Tensor]]:
    """The buffer that the original model stores, computed like its code does, in the checkpoint's precision."""

    def build(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        rotated = model_config.head_dim // 2
        return {ROTARY_BUFFER: 1.0 / (10000 ** (torch.arange(0, rotated, 2).to(dtype) / rotated))}  # (head_dim / 4,)

    return build


def _torch_dtype(dtype: str) -> torch.dtype | None:
    named: torch.dtype | None = None if dtype == "keep" else getattr(torch, dtype)
    return named


def output_bytes(stored: WeightFiles, dtype: str) -> int:
    """Size of all tensors in `dtype`, one of DTYPES."""
    named = _torch_dtype(dtype)
    return sum(
        (tensor.nbytes // tensor.dtype.itemsize) * (named or tensor.dtype).itemsize
        for tensor in stored.tensors.values()
    )


def _download_record(source: Path) -> dict[str, Any]:
    record = source / "download.json"
    return {"download": read_json(record)} if record.is_file() else {}
