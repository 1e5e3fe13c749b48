"""Download of a checkpoint: from which hub, at which commit, what is missing, and in which order it is fetched.

The record, download.json, is written before the first file: a later run goes on at the same commit, and a run that
finds every file contacts nobody. Nothing here loads or converts weights, and no program code is fetched.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from entrypoints.checkpoint.files import LFS_MARK, require_space
from entrypoints.checkpoint.hub_record import Record, read_record
from entrypoints.errors import UserError
from entrypoints.settings import Secret, Settings

logger = logging.getLogger(__name__)

SOURCES = ("huggingface", "modelscope")  # in the order in which `auto` asks them


class Place(NamedTuple):
    """A repository on one hub, and the revision that is taken unless another one is asked for."""

    repo: str
    revision: str


# Commits on Hugging Face are those that public sources name since 2024, as snapshot folders and in links (vLLM's
# chatglm.py: 32k). None is known for 128k, nor for ModelScope: there the branch is resolved when a download starts.
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


def download(model: str, folder: Path, source: str, revision: str | None, settings: Settings) -> Record:
    """Fill `folder` with the checkpoint `model` of the form ORG/NAME; `source` is one of SOURCES or "auto".

    Safe to run again and in two processes at once. Raises UserError for whatever the user or the network got wrong.
    """
    # read when huggingface_hub is imported: no details of this machine in the User-Agent
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    model = canonical(model)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", "name a folder with --output-dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            record = _known_or_planned(model, folder, source, revision, settings)
            _fetch(record, folder, settings)
    except OSError as error:
        remedy = "free space or choose another --output-dir; complete files stay, and the same command resumes"
        raise UserError(f"cannot write in {folder} ({error.strerror or error})", remedy) from error
    return record


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


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".download.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("another process downloads into %s; waiting for it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _known_or_planned(model: str, folder: Path, source: str, revision: str | None, settings: Settings) -> Record:
    """The record of the folder, made if there is none, with what lies there already marked as complete."""
    from entrypoints.checkpoint.hub_transfer import checked

    record = read_record(folder)
    ours = record is not None
    if record is None:
        record = _plan(model, source, revision, settings)
    else:
        record.require_same(folder, model, source, revision)
    foreign = []
    for file in record.files:
        path = folder / file.path
        if not path.exists():
            file.sha256 = ""
        elif not file.sha256 or path.stat().st_size != file.size:  # else: checked by an earlier run
            logger.info("checking %s, which is there already", path)
            file.sha256 = checked(path, file)
            if _is_pointer(path):
                logger.info("%s is a Git LFS pointer, not the file itself, which is fetched", path)
            elif not file.sha256:
                foreign.append(file.path)
    if foreign and not ours:
        raise UserError(f"{folder} holds other contents under {', '.join(foreign)}", "choose an empty --output-dir")
    return record


def _plan(model: str, source: str, revision: str | None, settings: Settings) -> Record:
    """Resolve the revision to a commit, once, on the first hub that has the model."""
    from entrypoints.checkpoint.hub_sources import NotHere, list_files, select

    _refuse_offline()
    places = KNOWN.get(model) or {"huggingface": Place(model, "main"), "modelscope": Place(model, "master")}
    reasons = []
    for name in SOURCES if source == "auto" else (source,):
        repo, default = places[name]
        try:
            listing = list_files(name, repo, revision or default, *_access(name, settings))
        except NotHere as error:
            if source != "auto":
                raise
            logger.warning("%s", error.problem)
            reasons.append(error.problem)
        else:
            files = select(listing.files, f"{repo} on {name}")
            return Record(model, name, listing.repo, revision or default, listing.commit, files)
    raise UserError(
        "; ".join(reasons), "check the name and the network, or name a mirror in HF_ENDPOINT or MODELSCOPE_ENDPOINT"
    )


def _fetch(record: Record, folder: Path, settings: Settings) -> None:
    from tqdm import tqdm

    from entrypoints.checkpoint.hub_sources import file_url
    from entrypoints.checkpoint.hub_transfer import fetch, present

    missing, total = record.missing(), len(record.files)
    done = total - len(missing)
    logger.info(
        "%s of %s at commit %s: %d of %d files are complete", record.repo, record.source, record.commit, done, total
    )
    if not missing:
        record.write(folder)
        return
    _refuse_offline()
    require_space(folder, sum(file.size - present(folder / f"{file.path}.part") for file in missing))
    record.write(folder)
    endpoint, token = _access(record.source, settings)
    size = sum(file.size for file in missing)
    with tqdm(total=size, unit="B", unit_scale=True, file=sys.stderr, disable=None) as bar:  # None: only on a terminal
        for file in missing:
            bar.set_description(file.path)
            url = file_url(record.source, record.repo, file, endpoint)
            try:
                file.sha256 = fetch(file, url, folder, token, bar.update)
            except UserError as error:
                problem = f"{error.problem} ({done} of {total} files are complete in {folder})"
                raise UserError(problem, error.remedy) from error
            record.write(folder)
            done += 1
            if bar.disable:
                logger.info("%s: %s, %d of %d", file.path, tqdm.format_sizeof(file.size, "B"), done, total)


def _access(source: str, settings: Settings) -> tuple[str, Secret]:
    """Endpoint of a hub and the token for it; ModelScope never gets the token of Hugging Face."""
    name, endpoint, token = {
        "huggingface": ("HF_ENDPOINT", settings.hf_endpoint, settings.hf_token),
        "modelscope": ("MODELSCOPE_ENDPOINT", settings.modelscope_endpoint, Secret()),
    }[source]
    if not endpoint.startswith(("http://", "https://")):
        raise UserError(
            f"{name} does not begin with https:// or http://", "give the whole address of the hub or mirror"
        )
    return endpoint.rstrip("/"), token


def _refuse_offline() -> None:
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        raise UserError("HF_HUB_OFFLINE=1 forbids to fetch anything", "set HF_HUB_OFFLINE=0 for this command")


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(LFS_MARK)) == LFS_MARK
