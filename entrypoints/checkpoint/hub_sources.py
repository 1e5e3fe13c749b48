"""What a repository holds at a revision: the listings of Hugging Face and ModelScope in one shape.

Only asks; the bytes are fetched by `hub_transfer`.
"""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, get_session, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from entrypoints.checkpoint.hub_record import HubFile
from entrypoints.errors import UserError
from entrypoints.settings import Secret

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

TIMEOUT = httpx2.Timeout(30, connect=10)  # seconds
ATTEMPTS = 3
WAIT_SECONDS = 1.0  # before the second attempt; doubles
PASSING = {408, 429, 500, 502, 503, 504}  # answers that another attempt may mend
SET_TOKEN = "accept its terms on its web page and set HF_TOKEN to a token of that account"

WEIGHTS = (  # one of these formats, the first that the repository has
    re.compile(r"model[\w.-]*\.safetensors(\.index\.json)?"),
    re.compile(r"pytorch_model[\w.-]*\.bin(\.index\.json)?"),
)
# no *.py: this product runs no code out of a checkpoint
OTHERS = {
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "README.md",
    "LICENSE",
    "MODEL_LICENSE",
}


class NotHere(UserError):
    """This hub cannot be reached or lacks the repository; another one may serve it."""


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit."""

    repo: str
    commit: str
    files: list[HubFile]


def list_files(source: str, repo: str, revision: str, endpoint: str, token: Secret) -> Listing:
    """All files of a model at a revision, which is resolved to a commit. Raises NotHere or UserError."""
    if source == "huggingface":
        return _list_huggingface(repo, revision, endpoint, token)
    return _list_modelscope(repo, revision, endpoint)


def _list_huggingface(repo: str, revision: str, endpoint: str, token: Secret) -> Listing:
    """All files of a model on the Hugging Face hub or a mirror of it.

    Raises NotHere, or UserError when the revision does not exist or access is refused.
    """
    name = f"{repo} on {_host(endpoint)}"
    # False: without HF_TOKEN no token is sent, not even one that another tool left in the home folder
    api = HfApi(endpoint=endpoint, token=token.value or False)
    try:
        info = _patiently(lambda: api.model_info(repo, revision=revision, files_metadata=True, timeout=30))
    except GatedRepoError as error:
        raise UserError(f"{name} is gated", SET_TOKEN) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{name} has no revision {revision}", "name another one with --revision, for example main"
        ) from error
    except RepositoryNotFoundError as error:
        raise NotHere(f"{name} does not exist, or is private", "check the name, or set HF_TOKEN") from error
    except httpx2.HTTPError as error:
        raise _refusal(error, name) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotHere(
            f"{name}: the answer is not that of a hub ({type(error).__name__})", "check HF_ENDPOINT"
        ) from error
    if not info.sha or any(file.size is None for file in info.siblings or []):
        raise NotHere(f"{name}: the answer lacks the commit or the sizes of the files", "check HF_ENDPOINT")
    files = [
        HubFile(
            path=file.rfilename,
            size=file.size,
            commit=info.sha,
            digest=file.lfs.sha256 if file.lfs else file.blob_id or "",
        )
        for file in info.siblings or []
    ]
    return Listing(info.id, info.sha, files)


def _list_modelscope(repo: str, revision: str, endpoint: str) -> Listing:
    """All files of a model on ModelScope; of public ones only, no token is sent.

    Its HTTP API is used as it is: the library accepts no commit as revision (modelscope#1386), takes a pickled token
    from the home folder, writes a session id there and sends it with the user's name (modelscope_hub 0.5.1, config.py).
    Raises NotHere, or UserError when the revision does not exist.
    """
    name = f"{repo} on {_host(endpoint)}"
    url = f"{endpoint}/api/v1/models/{repo}/repo/files"
    try:
        body = _patiently(lambda: _json(url, {"Revision": revision, "Recursive": "True"}))
        data = body.get("Data") or {}
        entries = data.get("Files")
        if not body.get("Success", True):
            raise NotHere(f"{name}: {body.get('Message')}", "check the name")
        if entries is None:  # the hub's answer, with status 200, to an unknown revision
            raise UserError(
                f"{name} has no revision {revision}", "name another one with --revision, for example master"
            )
        blobs = [entry for entry in entries if entry["Type"] == "blob"]
        commit = _modelscope_commit(data, blobs)
        files = [
            HubFile(
                path=entry["Path"],
                size=int(entry["Size"]),
                # the commit that wrote the file last: its content is that of `commit`, and the id is always complete
                commit=entry.get("Revision") or commit,
                digest=(entry.get("Sha256") or "").lower(),
            )
            for entry in blobs
        ]
    except httpx2.HTTPError as error:
        raise _refusal(error, name) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotHere(
            f"{name}: the answer is not that of ModelScope ({error!r})", "check MODELSCOPE_ENDPOINT"
        ) from error
    return Listing(repo, commit, files)


def file_url(source: str, repo: str, file: HubFile, endpoint: str) -> str:
    """Where the bytes of a file are."""
    if source == "huggingface":
        return hf_hub_url(repo, file.path, revision=file.commit, endpoint=endpoint)
    query = {"Revision": file.commit, "FilePath": file.path}
    return str(httpx2.URL(f"{endpoint}/api/v1/models/{repo}/repo", params=query))


def select(files: list[HubFile], name: str) -> list[HubFile]:
    """The files that this product uses: one weight format, configuration, tokenizer, licences.

    Raises UserError when there is no config.json or no weights.
    """
    found = [[file for file in files if pattern.fullmatch(file.path)] for pattern in WEIGHTS]
    weights = next((format_ for format_ in found if any(not file.path.endswith(".json") for file in format_)), None)
    others = [file for file in files if file.path in OTHERS]
    if weights is None or not any(file.path == "config.json" for file in others):
        raise UserError(f"{name} holds no checkpoint: no config.json or no weights", "check the name of the model")
    if all(found):
        logger.info("%s has weights in two formats; only %s is fetched", name, weights[0].path.partition(".")[2])
    return sorted(others + weights, key=lambda file: (file.size, file.path))


def _modelscope_commit(data: dict, blobs: list[dict]) -> str:
    """The commit that the listing shows. The hub often leaves `Id` empty and gives the first 8 digits only."""
    latest = data.get("LatestCommitter") or {}
    head = latest.get("Id") or latest.get("ShortId") or ""
    commits = [
        entry.get("Revision") or "" for entry in sorted(blobs, key=lambda entry: -(entry.get("CommittedDate") or 0))
    ]
    commit = next((commit for commit in commits if commit.startswith(head)), head)
    if not commit:
        raise ValueError("no commit")
    return commit


def _json(url: str, params: dict[str, str]) -> dict:
    return get_session().get(url, params=params, timeout=TIMEOUT).raise_for_status().json()


def _patiently(ask: Callable[[], Answer]) -> Answer:
    """Ask again after a passing fault; a hub that cannot be reached at all is not waited for."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return ask()
        except (httpx2.RequestError, httpx2.HTTPStatusError, HfHubHTTPError) as error:
            hopeless = isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.UnsupportedProtocol)
            if hopeless or _status(error) not in PASSING | {None} or attempt == ATTEMPTS:
                raise
            time.sleep(WAIT_SECONDS * 2 ** (attempt - 1))
    raise AssertionError("the last attempt returns or raises")


def _refusal(error: httpx2.HTTPError, name: str) -> UserError:
    status = _status(error)
    if status in (401, 403):
        return UserError(f"access to {name} is refused ({status})", SET_TOKEN)
    if status == 404:
        return NotHere(f"{name} does not exist", "check the name")
    if status:
        return NotHere(f"{name}: the hub answers {status}", "try again later")
    return NotHere(
        f"{name} cannot be reached ({error or type(error).__name__})",
        "check the network, or name a mirror in HF_ENDPOINT",
    )


def _status(error: httpx2.HTTPError) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def _host(endpoint: str) -> str:
    """Host of an endpoint; the whole address may hold a password."""
    return httpx2.URL(endpoint).host
