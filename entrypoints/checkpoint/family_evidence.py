"""Which family a folder in the original layout belongs to: what its files say, read as text and never executed.

ChatGLM2-6B-32k and ChatGLM3-6B-32k have equal configurations and tensors, but apply `rope_ratio` in different ways.
Only the program code beside the weights and the names in the configuration tell them apart.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from entrypoints.checkpoint.atomic_files import check_not_lfs_pointer
from entrypoints.checkpoint.tensor_files import read_json
from entrypoints.checkpoint.tokenizer import VOCABULARY_FILE
from entrypoints.errors import UserError
from entrypoints.families import FAMILIES, Family, family_named

MAX_CODE_BYTES = 1 << 20
MAX_FIRST_LINE = 2048
MODELING_FILE, TOKENIZATION_FILE = "modeling_chatglm.py", "tokenization_chatglm.py"
RATIO_SCALES = {  # how the modeling file uses rope_ratio -> Family.rope_ratio_scales
    "base": re.compile(r"base\s*\*\s*self\.rope_ratio|base\s*=\s*base\s*\*\s*rope_ratio"),
    "positions": re.compile(r"/\s*self\.rope_ratio"),
}
# what the tokenization file defines or imports -> the own template of the families with such a file
TOKENIZATION_TEMPLATES = {"ChatGLM4Tokenizer": "glm4", "build_chat_input": "chatglm3", "build_prompt": "round"}
Evidence = tuple[str, set[str]]  # where it was found, and the names of the families that agree with it


def identify_family(folder: Path, config: dict[str, Any], requested: str | None = None) -> Family:
    """The family of an original folder.

    config: its config.json. requested: the value of --family. It must agree with code, and with names except that a
    name may be that of a family which differs in nothing but names.
    Raises UserError: nothing names the family, or two files name different ones.
    """
    evidence, names = list(_code_evidence(folder)), list(_name_evidence(folder, config))
    if requested:
        evidence += [(where, _with_equal_formats(families)) for where, families in names]
        evidence.append(("--family", {family_named(requested).name}))
    else:
        evidence += names
    possible = set(FAMILIES).intersection(*(families for _, families in evidence))
    if len(possible) == 1:
        return FAMILIES[possible.pop()]
    if not possible:
        found = "; ".join(f"{where}: {' or '.join(sorted(families))}" for where, families in evidence)
        raise UserError(
            f"the files in {folder} belong to different model families ({found})",
            "omit --family, or give the folder of that family; a wrong name can be corrected in its file"
            if requested
            else "use the files of one repository",
        )
    raise UserError(
        f"the model family of {folder} cannot be identified: {' or '.join(sorted(possible))}",
        "name it with --family, or copy the repository's modeling_chatglm.py and config.json beside the weights",
    )


def possible_families(folder: Path, config: dict[str, Any]) -> set[str]:
    """Names of the families that no file of the folder contradicts."""
    evidence = [*_code_evidence(folder), *_name_evidence(folder, config)]
    return set(FAMILIES).intersection(*(families for _, families in evidence))


def _with_equal_formats(names: set[str]) -> set[str]:
    """These families and those that differ from one of them in names only, as CodeGeeX2 from ChatGLM2."""
    formats = [_format(FAMILIES[name]) for name in names]
    return {family.name for family in FAMILIES.values() if _format(family) in formats}


def _format(family: Family) -> Family:
    return replace(family, name="", title="", repository="", names=())


def _code_evidence(folder: Path) -> Iterator[Evidence]:
    modeling, tokenization = (_read_text(folder / name) for name in (MODELING_FILE, TOKENIZATION_FILE))
    for scales, pattern in RATIO_SCALES.items():
        if pattern.search(modeling):
            yield MODELING_FILE, {family.name for family in FAMILIES.values() if family.rope_ratio_scales == scales}
    for word, template in TOKENIZATION_TEMPLATES.items():
        if word in tokenization:
            yield TOKENIZATION_FILE, {family.name for family in FAMILIES.values() if family.templates[0] == template}
            break
    vocabulary = folder / VOCABULARY_FILE
    if vocabulary.is_file():
        _check_complete(vocabulary)
        kind = "tiktoken" if _is_ranks(vocabulary) else "sentencepiece"
        yield VOCABULARY_FILE, {family.name for family in FAMILIES.values() if family.vocabulary == kind}


def _check_complete(vocabulary: Path) -> None:
    """Raises UserError: what git leaves in place of the file would count as a vocabulary of another family."""
    check_not_lfs_pointer(vocabulary)
    if not vocabulary.stat().st_size:
        raise UserError(f"{vocabulary} is empty", "download the file again; in a clone, run `git lfs pull`")


def _is_ranks(file: Path) -> bool:
    """Whether a vocabulary is a text of tiktoken ranks, whose first line is the token of rank 0."""
    with file.open("rb") as stream:
        return re.match(rb"[A-Za-z0-9+/=]+ 0\r?\n", stream.read(MAX_FIRST_LINE)) is not None


def _name_evidence(folder: Path, config: dict[str, Any]) -> Iterator[Evidence]:
    """The first name that belongs to a family: of the download, of config.json, of the tokenizer."""
    download, tokenizer = (_optional_json(folder / name) for name in ("download.json", "tokenizer_config.json"))
    for where, value in (
        ("model of download.json", download.get("model")),
        ("_name_or_path of config.json", config.get("_name_or_path")),
        ("name_or_path of tokenizer_config.json", tokenizer.get("name_or_path")),
    ):
        families = families_in_name(value)
        if families:
            yield where, families
            return


def families_in_name(name: object) -> set[str]:
    """Names of the families that a repository name or a path mentions in its last part."""
    if not isinstance(name, str):
        return set()
    last = re.sub(r"[^a-z0-9]", "", name.rstrip("/\\").replace("\\", "/").rpartition("/")[2].lower())
    return {family.name for family in FAMILIES.values() if any(part in last for part in family.names)}


def _read_text(file: Path) -> str:
    if not file.is_file():
        return ""
    with file.open("rb") as stream:
        return stream.read(MAX_CODE_BYTES).decode("utf-8", "replace")


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
