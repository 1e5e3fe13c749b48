"""Download of a checkpoint: choice of hub and commit, which files are missing, and the order of fetching them.

The record, download.json, is written before the first file: a later run resumes at the same commit, and a run that
finds all files makes no network request. Nothing here loads or converts weights, and no program code is downloaded.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from entrypoints.checkpoint.atomic_files import LFS_POINTER_PREFIX, exclusive_lock, require_disk_space
from entrypoints.errors import UserError
from entrypoints.hub.record import RECORD_FILE, DownloadRecord, is_whole_commit, read_download_record
from entrypoints.settings import Secret, Settings
from entrypoints.untrusted import confined_path

logger = logging.getLogger(__name__)

SOURCES = ("huggingface", "modelscope")  # in the order in which `auto` tries them


class HubRepository(NamedTuple):
    """A repository on one hub, and its default revision."""

    repo: str
    revision: str


def _unpinned(name: str) -> dict[str, HubRepository]:
    """A model of which no commit is known: the branch is resolved at download time."""
    return {
        "huggingface": HubRepository(f"THUDM/{name}", "main"),
        "modelscope": HubRepository(f"ZhipuAI/{name}", "master"),
    }


# The commits on Hugging Face are those that public sources have named since 2024, as snapshot folders and in links
# (32k: vLLM's chatglm.py). None is known for the others, nor for ModelScope.
KNOWN_MODELS = {
    "THUDM/chatglm3-6b": {
        "huggingface": HubRepository("THUDM/chatglm3-6b", "e9e0406d062cdb887444fe5bd546833920abd4ac"),
        "modelscope": HubRepository("ZhipuAI/chatglm3-6b", "master"),
    },
    "THUDM/chatglm3-6b-base": {
        "huggingface": HubRepository("THUDM/chatglm3-6b-base", "f91a1de587fdc692073367198e65369669a0b49d"),
        "modelscope": HubRepository("ZhipuAI/chatglm3-6b-base", "master"),
    },
    "THUDM/chatglm3-6b-32k": {
        "huggingface": HubRepository("THUDM/chatglm3-6b-32k", "e210410255278dd9d74463cf396ba559c0ef801c"),
        "modelscope": HubRepository("ZhipuAI/chatglm3-6b-32k", "master"),
    },
    "THUDM/chatglm3-6b-128k": _unpinned("chatglm3-6b-128k"),
    "THUDM/chatglm2-6b": _unpinned("chatglm2-6b"),
    "THUDM/chatglm2-6b-32k": _unpinned("chatglm2-6b-32k"),
    "THUDM/codegeex2-6b": _unpinned("codegeex2-6b"),
    "THUDM/glm-4-9b": _unpinned("glm-4-9b"),
    "THUDM/glm-4-9b-chat": _unpinned("glm-4-9b-chat"),
    "THUDM/glm-4-9b-chat-1m": _unpinned("glm-4-9b-chat-1m"),
    "THUDM/glm-4-9b-hf": _unpinned("glm-4-9b-hf"),
    "THUDM/glm-4-9b-chat-hf": _unpinned("glm-4-9b-chat-hf"),
    "THUDM/glm-4-9b-chat-1m-hf": _unpinned("glm-4-9b-chat-1m-hf"),
}
ORGANIZATION_ALIASES = {"zai-org": "THUDM", "ZhipuAI": "THUDM"}  # its later name, and its name on ModelScope


def download(model: str, folder: Path, source: str, revision: str | None, settings: Settings) -> DownloadRecord:
    """Download the checkpoint `model` (ORG/NAME) to `folder`. source: one of SOURCES or "auto".

    Safe to run again and in two processes at once. Raises UserError: wrong arguments, network or disk errors.
    """
    # read when huggingface_hub is imported: no details of this machine in the User-Agent
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    model = canonical_name(model)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", "name a folder with --output-dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder / ".download.lock", f"is downloading to {folder}"):
            record = _existing_or_new_record(model, folder, source, revision, settings)
            _fetch_missing(record, folder, settings)
    except OSError as error:
        remedy = "free space or choose another --output-dir; complete files are kept, and the same command resumes"
        raise UserError(f"cannot write in {folder} ({error.strerror or error})", remedy) from error
    return record


def canonical_name(model: str) -> str:
    """The name in KNOWN_MODELS for any alias of the organization; another ORG/NAME unchanged.

    Raises UserError: it does not have that form.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not re-exported

    try:
        validate_repo_id(model)
        organization, name = model.split("/")
    except (HFValidationError, ValueError) as error:
        raise UserError(
            f"{model!r} is not a model name", f"use ORG/NAME, for example {next(iter(KNOWN_MODELS))}"
        ) from error
    known = f"{ORGANIZATION_ALIASES.get(organization, organization)}/{name}"
    return known if known in KNOWN_MODELS else model


def _existing_or_new_record(
    model: str, folder: Path, source: str, revision: str | None, settings: Settings
) -> DownloadRecord:
    """The record of the folder, created if there is none, with existing files verified and marked as complete."""
    record = read_download_record(folder)
    if record:
        _check_record(record, folder)
        record.check_request(folder, model, source, revision)
        _mark_complete_files(record, folder)
        return record
    record = _resolve(model, source, revision, settings)
    differing = _mark_complete_files(record, folder)
    if differing:
        raise UserError(
            f"{folder} contains other files under the names {', '.join(differing)}", "choose an empty --output-dir"
        )
    return record


def _planned_repositories(model: str) -> dict[str, HubRepository]:
    """Where each hub has the model, and the revision to download by default."""
    return KNOWN_MODELS.get(model) or {
        "huggingface": HubRepository(model, "main"),
        "modelscope": HubRepository(model, "master"),
    }


def _check_record(record: DownloadRecord, folder: Path) -> None:
    """Raises UserError unless this command could have written the record: it may come with a folder from elsewhere."""
    from entrypoints.hub.listing import select_files

    planned = _planned_repositories(record.model).get(record.source)
    selected = select_files(record.files, f"{folder / RECORD_FILE}")
    problems = {
        f"source {record.source!r:.60}": planned is None,
        f"repository {record.repo!r:.100}, which is not that of {record.model!r:.100}": planned is not None
        and record.repo != planned.repo
        and canonical_name(record.repo) != record.model,
        f"commit {record.commit}, which is not revision {record.revision}": is_whole_commit(record.revision)
        and record.commit != record.revision,
        "files from several commits": record.source == "huggingface"
        and any(file.commit != record.commit for file in record.files),
        "files that this command does not download": len({file.path for file in selected}) < len(record.files),
    }
    wrong = [problem for problem, applies in problems.items() if applies]
    if wrong:
        raise UserError(
            f"{folder / RECORD_FILE} was not written by this command: it has {'; '.join(wrong)}",
            "remove it, or choose an empty --output-dir",
        )


def _mark_complete_files(record: DownloadRecord, folder: Path) -> list[str]:
    """Set `sha256` of the files that are present and correct; returns the paths of files with other contents."""
    from entrypoints.hub.transfer import verified_sha256

    differing = []
    for file in record.files:
        path = confined_path(folder, file.path, folder / RECORD_FILE)
        if not path.exists():
            file.sha256 = ""
        elif not file.sha256 or path.stat().st_size != file.size:  # otherwise verified by an earlier run
            logger.info("checking the existing file %s", path)
            file.sha256 = verified_sha256(path, file)
            if _is_lfs_pointer(path):
                logger.info("%s is a Git LFS pointer, not the file itself; downloading the file", path)
            elif not file.sha256:
                differing.append(file.path)
    return differing


def _resolve(model: str, source: str, revision: str | None, settings: Settings) -> DownloadRecord:
    """Resolve the revision to a commit, once, on the first hub that has the model."""
    from entrypoints.hub.listing import HubLookupError, list_files, select_files

    _require_online()
    repositories = _planned_repositories(model)
    problems = []
    for name in SOURCES if source == "auto" else (source,):
        repo, default = repositories[name]
        try:
            listing = list_files(name, repo, revision or default, *_endpoint_and_token(name, settings))
        except HubLookupError as error:
            if source != "auto":
                raise
            logger.warning("%s", error.problem)
            problems.append(error.problem)
        else:
            files = select_files(listing.files, f"{repo} on {name}")
            # a renamed organization is recorded; any other repository that the hub answers for is not
            repo = listing.repo if canonical_name(listing.repo) == model else repo
            return DownloadRecord(model, name, repo, revision or default, listing.commit, files)
    raise UserError(
        "; ".join(problems), "check the name and the network, or set HF_ENDPOINT or MODELSCOPE_ENDPOINT to a mirror"
    )


def _fetch_missing(record: DownloadRecord, folder: Path, settings: Settings) -> None:
    from tqdm import tqdm

    from entrypoints.hub.listing import file_url
    from entrypoints.hub.transfer import fetch, size_on_disk

    missing, total = record.missing(), len(record.files)
    done = total - len(missing)
    logger.info(
        "%s of %s at commit %s: %d of %d files are complete", record.repo, record.source, record.commit, done, total
    )
    if not missing:
        record.write(folder)
        return
    _require_online()
    require_disk_space(folder, sum(file.size - size_on_disk(folder / f"{file.path}.part") for file in missing))
    record.write(folder)
    endpoint, token = _endpoint_and_token(record.source, settings)
    size = sum(file.size for file in missing)
    with tqdm(total=size, unit="B", unit_scale=True, file=sys.stderr, disable=None) as bar:  # None: only on a terminal
        for file in missing:
            bar.set_description(file.path)
            url = file_url(record.source, record.repo, file, endpoint)
            with _counting_complete_files(done, total, folder):
                file.sha256 = fetch(file, url, folder, token, bar.update)
            record.write(folder)
            done += 1
            if bar.disable:
                logger.info("%s: %s, %d of %d", file.path, tqdm.format_sizeof(file.size, "B"), done, total)


@contextlib.contextmanager
def _counting_complete_files(done: int, total: int, folder: Path) -> Iterator[None]:
    """Add to a UserError how many files are complete."""
    try:
        yield
    except UserError as error:
        problem = f"{error.problem} ({done} of {total} files are complete in {folder})"
        raise UserError(problem, error.remedy) from error


def _endpoint_and_token(source: str, settings: Settings) -> tuple[str, Secret]:
    """Endpoint of a hub and its token; ModelScope never gets the token of Hugging Face."""
    variable, endpoint, token = {
        "huggingface": ("HF_ENDPOINT", settings.hf_endpoint, settings.hf_token),
        "modelscope": ("MODELSCOPE_ENDPOINT", settings.modelscope_endpoint, Secret()),
    }[source]
    if not endpoint.startswith(("http://", "https://")):
        raise UserError(
            f"{variable} does not start with https:// or http://", "give the whole URL of the hub or mirror"
        )
    return endpoint.rstrip("/"), token


def _require_online() -> None:
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        raise UserError("HF_HUB_OFFLINE=1 forbids downloads", "set HF_HUB_OFFLINE=0 for this command")


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(LFS_POINTER_PREFIX)) == LFS_POINTER_PREFIX
