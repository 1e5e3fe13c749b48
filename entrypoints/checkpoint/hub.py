"""Download of a checkpoint: from which hub, at which commit, what is missing, and the record of it.

`download.json` in the folder names source, repository, commit and every file with size and SHA-256. It is written
before the first file, so that a later run goes on at the same commit; a run that finds all files contacts nobody.
"""

import json
import logging
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from entrypoints.checkpoint.files import LFS_MARK, require_space
from entrypoints.errors import UserError
from entrypoints.settings import Secret, Settings

if TYPE_CHECKING:
    from entrypoints.checkpoint.hub_sources import HubFile

logger = logging.getLogger(__name__)

SOURCES = ("huggingface", "modelscope")  # in the order in which `auto` asks them
RECORD = "download.json"
LOCK = ".download.lock"


class Place(NamedTuple):
    """A repository on one hub."""

    repo: str
    revision: str


# Commits of Hugging Face: those that public sources name for these repositories, as snapshot folders and links, since
# 2024 (vLLM's chatglm.py links the one of 32k). None is known for 128k, nor for ModelScope: the branch is resolved.
KNOWN = {
    "THUDM/chatglm3-6b": {
        "huggingface": Place("THUDM/chatglm3-6b", "e9e0406d062cdb887444fe5bd546833920abd4ac"),
        "modelscope": Place("ZhipuAI/chatglm3-6b", "master"),
    },
    "THUDM/chatglm3-6b-base": {
        "huggingface": Place("THUDM/chatglm3-6b-base", "f91a1de587fdc692073367198e65369669a0b49d"),
        "modelscope": Place("ZhipuAI/chatglm3-6b-base", "master"),
    },
    "THUDM/chatglm3-6b-32k": {
        "huggingface": Place("THUDM/chatglm3-6b-32k", "e210410255278dd9d74463cf396ba559c0ef801c"),
        "modelscope": Place("ZhipuAI/chatglm3-6b-32k", "master"),
    },
    "THUDM/chatglm3-6b-128k": {
        "huggingface": Place("THUDM/chatglm3-6b-128k", "main"),
        "modelscope": Place("ZhipuAI/chatglm3-6b-128k", "master"),
    },
}
SAME_ORGANISATION = {"zai-org": "THUDM", "ZhipuAI": "THUDM"}  # its later name, and its name on ModelScope


@dataclass
class Record:
    """What download.json holds."""

    model: str
    source: str
    repo: str
    revision: str  # as asked for
    commit: str
    files: list["HubFile"]


def download(model: str, folder: Path, source: str, revision: str | None, settings: Settings) -> Record:
    """Fill `folder` with the checkpoint `model` of the form ORG/NAME; `source` is one of SOURCES or "auto".

    Safe to run again and in two processes at once. Raises UserError for whatever the user or the network got wrong.
    """
    from filelock import FileLock, Timeout

    # read when huggingface_hub is imported: no details of this machine in the User-Agent
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    model = canonical(model)
    _refuse_offline()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("another process downloads into %s; waiting for it", folder)
            lock.acquire()
        with lock:
            lock.release()
            return _download(model, folder, source, revision, settings)
    except FileExistsError as error:
        raise UserError(f"{folder} is a file", "name a folder with --output-dir") from error
    except OSError as error:
        remedy = "free space or choose another --output-dir; what is complete stays, and the same command resumes"
        raise UserError(f"cannot write in {folder} ({error.strerror or error})", remedy) from error


def canonical(model: str) -> str:
    """The name of a known model, whichever of its organisations is given; any other ORG/NAME as it is.

    Raises UserError when it has not that form.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(model)
        organisation, name = model.split("/")
    except (HFValidationError, ValueError) as error:
        raise UserError(f"{model!r} is no model name", f"give ORG/NAME, for example {next(iter(KNOWN))}") from error
    known = f"{SAME_ORGANISATION.get(organisation, organisation)}/{name}"
    return known if known in KNOWN else model


def _download(model: str, folder: Path, source: str, revision: str | None, settings: Settings) -> Record:
    record = _read(folder)
    if record:
        _require_same(record, folder, model, source, revision)
        _recheck(record, folder)
    else:
        record = _plan(model, source, revision, settings)
        _adopt(record, folder)
    missing = [file for file in record.files if not file.sha256]
    _announce(record, folder, missing)
    if missing:
        from entrypoints.checkpoint.hub_transfer import present

        needed = sum(file.size - present(folder / f"{file.path}.part") for file in missing)
        require_space(folder, needed)
        _write(record, folder)
        _fetch(record, missing, folder, settings)
    return record
