"""The native folder: what plain transformers loads, and how it is opened with every check that costs no reading."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from entrypoints.checkpoint.layout import Shape, stored_in, stored_shapes
from entrypoints.checkpoint.manifest import MANIFEST_FILE, check_manifest
from entrypoints.checkpoint.original import TensorFiles, open_tensors, read_json
from entrypoints.checkpoint.tokenizer import TOKENIZER_FILE, VOCABULARY_FILE, Tokenizer, load_tokenizer
from entrypoints.errors import UserError
from entrypoints.prompt import PromptFormat
from entrypoints.sampling import Sampling

PROMPT_FILE = "prompt.json"
TEMPLATE_FILE = "chat_template.jinja"
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer_config.json",
    PROMPT_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    VOCABULARY_FILE,
)


@dataclass(frozen=True)
class NativeCheckpoint:
    """A checked folder: its shape, its tokenizer and the prompt format it was taught."""

    folder: Path
    shape: Shape
    tokenizer: Tokenizer
    prompt_format: PromptFormat
    files: TensorFiles
    load_in: str | None = None  # 8bit or 4bit where it is stored so, as settings.LOADS calls it


def open_native(folder: Path, verify: bool = False, quantised: bool = False) -> NativeCheckpoint:
    """Check a converted folder: config, tensor names and shapes, file sizes; with `verify` every file's hash too.

    quantised: is one that `glm quantize` made of a folder welcome? It can only answer.
    Raises UserError naming what is missing or wrong. A folder without a manifest is refused only with `verify`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder", "name the folder of a converted checkpoint (--model, MODEL_PATH)")
    config = read_json(folder / "config.json")
    shape = Shape.from_native(config, folder / "config.json", quantised)
    load_in = stored_in(config, folder / "config.json")
    if verify or (folder / MANIFEST_FILE).is_file():
        check_manifest(folder, hashes=verify)
    files = open_tensors(folder)
    described = frozenset(name for name in files.tensors if load_in and ".quant_state." in name)
    files.check(stored_shapes(shape, load_in), described)
    tokenizer = load_tokenizer(folder)
    if tokenizer.size > shape.vocabulary:
        raise UserError(
            f"{folder / TOKENIZER_FILE} has {tokenizer.size} ids, config.json {shape.vocabulary}",
            "use the vocabulary of this checkpoint",
        )
    return NativeCheckpoint(folder, shape, tokenizer, read_prompt_format(folder), files, load_in)


def save_tensors(weights: dict[str, torch.Tensor], file: Path) -> None:
    """Write one safetensors file; raises OSError when the disk does not take it."""
    with disk_errors():
        save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)  # the library makes it 0600, which a container's other user cannot read


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Make the error by which safetensors passes on what the disk said an OSError, as all other writing raises."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def write_settings(folder: Path, shape: Shape, dtype: str, tokenizer: Tokenizer, prompt_format: PromptFormat) -> None:
    """Write all small files but the vocabulary: configs of model, generation and tokenizer, and the prompt format."""
    write_json(folder / "config.json", shape.native_config(dtype, tokenizer.stop_ids, tokenizer.pad_id))
    default = Sampling()
    write_json(
        folder / "generation_config.json",
        {
            "do_sample": True,
            "eos_token_id": list(tokenizer.stop_ids),
            "pad_token_id": tokenizer.pad_id,
            "temperature": default.temperature,
            "top_p": default.top_p,
        },
    )
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "eos_token": "</s>",
            "pad_token": "<unk>",
            "unk_token": "<unk>",
            "padding_side": "left",
            "model_max_length": shape.window,
        },
    )
    write_prompt_format(folder, prompt_format)


def write_prompt_format(folder: Path, prompt_format: PromptFormat) -> None:
    """Store how the checkpoint is asked: for us as prompt.json, for others as chat_template.jinja."""
    write_json(folder / PROMPT_FILE, asdict(prompt_format))
    (folder / TEMPLATE_FILE).write_text(prompt_format.chat_template(), encoding="utf-8")


def read_prompt_format(folder: Path) -> PromptFormat:
    """The stored prompt format; a folder without one was taught ChatGLM3's own."""
    file = folder / PROMPT_FILE
    if not file.is_file():
        return PromptFormat()
    try:
        return PromptFormat(**read_json(file))
    except TypeError as error:
        raise UserError(f"{file} is not understood ({error})", "it holds `template` and `source_prefix`") from error


def save_tokenizer(folder: Path, tokenizer: object) -> None:
    """Write a `tokenizers.Tokenizer` as tokenizer.json."""
    # not by its own save, which raises a plain Exception when the disk is full
    (folder / TOKENIZER_FILE).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def copy_vocabulary(source: Path, target: Path) -> None:
    """Copy tokenizer.json, and the original tokenizer.model where there is one."""
    for name in (TOKENIZER_FILE, VOCABULARY_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def model_files(folder: Path) -> list[Path]:
    """The files of a folder that loading needs, without logs, optimizer states and results."""
    return sorted(file for pattern in MODEL_FILES for file in folder.glob(pattern))


def write_json(file: Path, value: dict) -> None:
    """Write a JSON object as the other files of a checkpoint are written."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
