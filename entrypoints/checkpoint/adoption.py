"""Folders that are native already but were not written by this package, such as glm-4-9b-chat-hf.

The tensors are copied unchanged. The tokenizer is built again from the tokens of tokenizer.json: published folders have
fewer merges than the reference needs, and give some texts other ids.
"""

from pathlib import Path
from typing import Any

import tokenizers

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.checkpoint import native, tiktoken_vocabulary
from entrypoints.checkpoint.atomic_files import atomic_folder, require_disk_space
from entrypoints.checkpoint.conversion import copied_tensors, output_bytes, write_weights
from entrypoints.checkpoint.layout import ModelConfig, expected_shapes
from entrypoints.checkpoint.manifest import write_manifest
from entrypoints.checkpoint.prompt_file import PROMPT_FILE
from entrypoints.checkpoint.tensor_files import open_weight_files, read_json
from entrypoints.checkpoint.tokenizer import TOKENIZER_FILE, VOCABULARY_FILE, Tokenizer, with_special_tokens
from entrypoints.errors import UserError
from entrypoints.families import GLM4, Family

# top-level keys of older releases of transformers -> keys of rope_parameters
OLD_ROPE_KEYS = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
OLD_PARTIAL_ROTARY_FACTOR = 0.5  # the default of GlmConfig


def is_foreign_native(folder: Path) -> bool:
    """Whether the folder has the native layout, a tokenizer.json and no prompt format of this package."""
    file = folder / "config.json"
    if not file.is_file() or (folder / PROMPT_FILE).is_file() or not (folder / TOKENIZER_FILE).is_file():
        return False
    return read_json(file).get("model_type") == "glm" and GLM4.eos_token in _added_tokens(folder)


def adopt_native(
    source: Path, target: Path, dtype: str = "keep", overwrite: bool = False, requested: str | None = None
) -> None:
    """Write the folder as `glm convert` writes one; `target` appears atomically. dtype: one of conversion.DTYPES.

    requested: the value of --family. Raises UserError: it, a tensor, a number or the vocabulary is not that of GLM-4.
    """
    family, file = GLM4, source / "config.json"
    if requested and requested != family.name:
        raise UserError(f"{source} has the vocabulary of {family.title}, not of {requested}", "omit --family")
    model_config = ModelConfig.from_native(_with_rope_parameters(read_json(file)), file)
    stored = open_weight_files(source)
    stored.check_shapes(expected_shapes(model_config, None))
    ranks = _ranks(source, family)
    backend = _tokenizer(ranks, source, family)
    if backend.get_vocab_size() > model_config.vocab_size:
        raise UserError(f"{source / TOKENIZER_FILE} has more ids than config.json", "copy the folder again")
    with atomic_folder(target, overwrite) as folder:
        require_disk_space(folder, output_bytes(stored, dtype))
        written_dtype = write_weights(stored, copied_tensors(stored), folder, dtype)
        native.save_tokenizer(folder, backend)
        (folder / VOCABULARY_FILE).write_bytes(tiktoken_vocabulary.ranks_file(ranks))
        tokenizer = Tokenizer(backend, family)
        native.write_config_files(folder, model_config, written_dtype, tokenizer, PromptFormat.of(family))
        write_manifest(folder, {"made_by": "glm convert", "source": source.resolve().name})


def _with_rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as current releases of transformers write it."""
    if isinstance(config.get("rope_parameters"), dict):
        return config
    rope = {new: config[old] for old, new in OLD_ROPE_KEYS.items() if old in config}
    rope = {"rope_type": "default", "partial_rotary_factor": OLD_PARTIAL_ROTARY_FACTOR, **rope}
    return {key: value for key, value in config.items() if key not in OLD_ROPE_KEYS} | {"rope_parameters": rope}


def _added_tokens(folder: Path) -> dict[str, int]:
    content = read_json(folder / TOKENIZER_FILE)
    try:
        return {token["content"]: token["id"] for token in content["added_tokens"]}
    except (TypeError, KeyError) as error:
        raise _damaged(folder, error) from error


def _ranks(folder: Path, family: Family) -> list[bytes]:
    """The bytes of each token of tokenizer.json, in the order of their ids. Raises UserError: it is not GLM-4's."""
    try:
        vocabulary: dict[str, int] = read_json(folder / TOKENIZER_FILE)["model"]["vocab"]
        ordinary = {name: id_ for name, id_ in vocabulary.items() if name not in family.special_tokens}
        by_id = {id_: tiktoken_vocabulary.token_bytes(name) for name, id_ in ordinary.items()}
        ranks = [by_id[id_] for id_ in range(len(by_id))]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise _damaged(folder, error) from error
    expected = {name: len(ranks) + place for place, name in enumerate(family.special_tokens)}
    if not expected.items() <= _added_tokens(folder).items():
        raise UserError(
            f"{folder / TOKENIZER_FILE} has other special tokens than {family.title}",
            f"use the folder of {family.repository}",
        )
    return ranks


def _tokenizer(ranks: list[bytes], folder: Path, family: Family) -> tokenizers.Tokenizer:
    return with_special_tokens(tiktoken_vocabulary.from_ranks(ranks, f"{folder / TOKENIZER_FILE}"), family)


def _damaged(folder: Path, error: Exception) -> UserError:
    return UserError(f"{folder / TOKENIZER_FILE} is not a vocabulary of {GLM4.title} ({error!r})", "copy it again")
