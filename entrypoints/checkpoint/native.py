"""The native folder, which plain transformers loads: opening it with every check that needs no reading of weights."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.chat_format.sampling import Sampling
from entrypoints.checkpoint.adapter_config import CONFIG_FILE
from entrypoints.checkpoint.config_values import read_token_ids
from entrypoints.checkpoint.layout import ModelConfig, expected_shapes, stored_quantization
from entrypoints.checkpoint.manifest import MANIFEST_FILE, check_manifest
from entrypoints.checkpoint.prompt_file import PROMPT_FILE, read_prompt_format
from entrypoints.checkpoint.tensor_files import WeightFiles, open_weight_files, read_json
from entrypoints.checkpoint.tokenizer import TOKENIZER_FILE, VOCABULARY_FILE, Tokenizer, load_tokenizer
from entrypoints.errors import UserError
from entrypoints.file_writing import write_json

TEMPLATE_FILE = "chat_template.jinja"
MAX_PRETTY_TOKENS = 100_000  # an indented tokenizer.json of GLM-4 has 18 MB in place of 7
GENERATION_FILE = "generation_config.json"
MODEL_FILES = (
    "config.json",
    GENERATION_FILE,
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
    """A validated folder: its model configuration, tokenizer and the prompt format it was tuned with."""

    folder: Path
    model_config: ModelConfig
    tokenizer: Tokenizer
    prompt_format: PromptFormat
    files: WeightFiles
    load_in: str | None = None  # `8bit` or `4bit` if the folder is stored quantized, as in --load-in


def open_native(folder: Path, verify: bool = False, quantized: bool = False) -> NativeCheckpoint:
    """Check a converted folder: config, tensor names and shapes, file sizes; with `verify` also every file's hash.

    quantized: accept a folder that `glm quantize` wrote, which supports inference only.
    Raises UserError naming what is missing or wrong. A folder without a manifest is rejected only with `verify`.
    """
    if not folder.is_dir():
        raise UserError(f"folder not found: {folder}", "give the path of a converted checkpoint (--model, MODEL_PATH)")
    if (folder / CONFIG_FILE).is_file():  # transformers would load that adapter too, with every field of its file
        raise UserError(f"{folder} contains a model and {CONFIG_FILE}", "move the adapter to a folder of its own")
    config = read_json(folder / "config.json")
    model_config = ModelConfig.from_native(config, folder / "config.json", quantized)
    load_in = stored_quantization(config, folder / "config.json")
    if verify or (folder / MANIFEST_FILE).is_file():
        check_manifest(folder, hashes=verify)
    files = open_weight_files(folder)
    quant_states = frozenset(name for name in files.tensors if load_in and ".quant_state." in name)
    files.check_shapes(expected_shapes(model_config, load_in), optional=quant_states)
    tokenizer = load_tokenizer(folder)
    if tokenizer.size > model_config.vocab_size:
        raise UserError(
            f"{folder / TOKENIZER_FILE} has {tokenizer.size} ids, config.json {model_config.vocab_size}",
            "use the vocabulary of this checkpoint",
        )
    _check_generation_config(folder, tokenizer, model_config.vocab_size)
    return NativeCheckpoint(folder, model_config, tokenizer, read_prompt_format(folder), files, load_in)


def _check_generation_config(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises UserError: generation_config.json is damaged, or has stop ids of another model.

    Its other settings never apply, because each request passes its own; vLLM adds its stop ids to those of a request.
    """
    file = folder / GENERATION_FILE
    if not os.path.lexists(file):
        return
    ids = read_token_ids(read_json(file), "eos_token_id", vocab_size, file)
    other = sorted(set(ids) - set(tokenizer.stop_ids))
    if other:
        raise UserError(
            f"{file}: eos_token_id has {other}, the stop ids of the tokenizer are {sorted(tokenizer.stop_ids)}",
            f"remove {GENERATION_FILE}, or copy it again",
        )


def save_tensors(weights: dict[str, torch.Tensor], file: Path) -> None:
    """Write one safetensors file. Raises OSError: the disk is full or fails."""
    with safetensors_errors_as_os_errors():
        save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)  # the library creates it with 0600, which another user in a container cannot read


@contextlib.contextmanager
def safetensors_errors_as_os_errors() -> Iterator[None]:
    """Convert the error that safetensors raises for a failed write to OSError, which all other writing raises."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def write_config_files(
    folder: Path, model_config: ModelConfig, dtype: str, tokenizer: Tokenizer, prompt_format: PromptFormat
) -> None:
    """Write the small files except the vocabulary: configs of model, generation and tokenizer, and prompt format."""
    write_json(folder / "config.json", model_config.native_config(dtype, tokenizer.stop_ids, tokenizer.pad_id))
    default = Sampling()
    write_json(
        folder / GENERATION_FILE,
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
            "eos_token": tokenizer.family.eos_token,
            "pad_token": tokenizer.family.pad_token,
            **({"unk_token": "<unk>"} if tokenizer.family.pad_token == "<unk>" else {}),
            "padding_side": "left",
            "model_max_length": model_config.context_length,
        },
    )
    write_prompt_format(folder, prompt_format)


def write_prompt_format(folder: Path, prompt_format: PromptFormat) -> None:
    """Store the prompt format: as prompt.json for this package, as chat_template.jinja for other programs."""
    write_json(folder / PROMPT_FILE, asdict(prompt_format))
    (folder / TEMPLATE_FILE).write_text(prompt_format.chat_template(), encoding="utf-8")


def save_tokenizer(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Write tokenizer.json. Raises OSError: the disk is full or fails."""
    # not with Tokenizer.save, which raises a plain Exception when the disk is full
    pretty = tokenizer.get_vocab_size() <= MAX_PRETTY_TOKENS
    (folder / TOKENIZER_FILE).write_text(tokenizer.to_str(pretty=pretty), encoding="utf-8")


def copy_vocabulary(source: Path, target: Path) -> None:
    """Copy tokenizer.json, and the original tokenizer.model if there is one."""
    for name in (TOKENIZER_FILE, VOCABULARY_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def model_files(folder: Path) -> list[Path]:
    """The files of a folder that loading needs, without logs, optimizer states and results."""
    return sorted(file for pattern in MODEL_FILES for file in folder.glob(pattern))
