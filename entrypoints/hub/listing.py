"""The files of a repository at a revision: the listings of Hugging Face and ModelScope in one form.

Only metadata is requested here; `transfer` downloads the files.
"""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2
from huggingface_hub import get_session, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]  # not re-exported

from entrypoints.errors import UserError
from entrypoints.hub.record import HubFile, is_commit
from entrypoints.settings import Secret
from entrypoints.untrusted import parse_json

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

TIMEOUT = httpx2.Timeout(30, connect=10)  # seconds
MAX_ATTEMPTS = 3
RETRY_WAIT_SECONDS = 1.0  # before the second attempt; doubles
MAX_LISTING_BYTES = 8 << 20  # decompressed; 10,000 files have 3 MB
MAX_LISTING_SECONDS = 120.0
NOT_A_LISTING = (ValueError, KeyError, TypeError, AttributeError, OverflowError)  # fields of another type or range
TRANSIENT_STATUSES = {408, 429, 500, 502, 503, 504}  # of HTTP responses that a retry may fix
SET_TOKEN = "accept its terms on its web page and set HF_TOKEN to a token of that account"

WEIGHT_PATTERNS = (  # only the first format that the repository has is downloaded
    re.compile(r"model[\w.-]*\.safetensors(\.index\.json)?"),
    re.compile(r"pytorch_model[\w.-]*\.bin(\.index\.json)?"),
)
# no *.py: this package never runs code of a checkpoint
OTHER_FILES = {
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


class HubLookupError(UserError):
    """This hub is unreachable or does not have the repository; another hub may have it."""


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit; an empty one if the hub gives none."""

    repo: str
    commit: str
    files: list[HubFile]

    def __post_init__(self) -> None:
        """Raises ValueError: a commit that no hub gives."""
        if self.commit and not is_commit(self.commit):
            raise ValueError(f"commit {self.commit!r:.60}")


def list_files(source: str, repo: str, revision: str, endpoint: str, token: Secret) -> Listing:
    """All files of a model at a revision, which is resolved to a commit. Raises HubLookupError or UserError."""
    if source == "huggingface":
        return _list_huggingface(repo, revision, endpoint, token)
    return _list_modelscope(repo, revision, endpoint)


def file_url(source: str, repo: str, file: HubFile, endpoint: str) -> str:
    """URL of a file's contents."""
    if source == "huggingface":
        return hf_hub_url(repo, file.path, revision=file.commit, endpoint=endpoint)
    query = {"Revision": file.commit, "FilePath": file.path}
    return str(httpx2.URL(f"{endpoint}/api/v1/models/{repo}/repo", params=query))


def select_files(files: list[HubFile], repository: str) -> list[HubFile]:
    """The files that this package uses: weights in one format, configuration, tokenizer, licenses; smallest first.

    Raises UserError: config.json or the weights are missing.
    """
    formats = [[file for file in files if pattern.fullmatch(file.path)] for pattern in WEIGHT_PATTERNS]
    weights = next((found for found in formats if any(not file.path.endswith(".json") for file in found)), None)
    others = [file for file in files if file.path in OTHER_FILES]
    if weights is None or not any(file.path == "config.json" for file in others):
        raise UserError(
            f"{repository} contains no checkpoint: config.json or weights are missing", "check the name of the model"
        )
    if all(formats):
        suffix = weights[0].path.partition(".")[2]
        logger.info("%s has weights in two formats; only %s is downloaded", repository, suffix)
    return sorted(others + weights, key=lambda file: (file.size, file.path))


def _list_huggingface(repo: str, revision: str, endpoint: str, token: Secret) -> Listing:
    """Hugging Face or a mirror of it. Raises HubLookupError, or UserError: unknown revision or no access."""
    name = f"{repo} on {_host(endpoint)}"
    url = f"{endpoint}/api/models/{repo}/revision/{quote(revision, safe='')}"
    # False: without HF_TOKEN no token is sent, not even one that another tool stored in the home folder
    headers = build_hf_headers(token=token.value or False)
    try:
        info = _with_retries(lambda: _get_json(url, {"blobs": "True"}, headers))
        siblings = info.get("siblings") or []
        files = [
            HubFile(file["rfilename"], file["size"], info["sha"], _published_digest(file))
            for file in siblings
            if info.get("sha") and file.get("size") is not None
        ]
        listing = Listing(f"{info['id']}", f"{info.get('sha') or ''}", _without_duplicates(files))
    except GatedRepoError as error:
        raise UserError(f"{name} is gated", SET_TOKEN) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{name} has no revision {revision}", "name another one with --revision, for example main"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubLookupError(f"{name} does not exist, or is private", "check the name, or set HF_TOKEN") from error
    except httpx2.HTTPError as error:
        raise _http_error(error, name) from error
    except NOT_A_LISTING as error:
        raise HubLookupError(
            f"{name}: the response is not that of a hub ({type(error).__name__})", "check HF_ENDPOINT"
        ) from error
    if not listing.commit or len(files) < len(siblings):
        raise HubLookupError(f"{name}: the response lacks the commit or the sizes of files", "check HF_ENDPOINT")
    return listing


def _published_digest(file: dict[str, Any]) -> str:
    """SHA-256 of a large file, git's blob id of a small one."""
    lfs = file.get("lfs")
    digest: str = lfs["sha256"] if lfs else file.get("blobId") or ""
    return digest


def _without_duplicates(files: list[HubFile]) -> list[HubFile]:
    """Raises ValueError: a path is listed twice."""
    if len({file.path for file in files}) < len(files):
        raise ValueError("a path is listed twice")
    return files


def _list_modelscope(repo: str, revision: str, endpoint: str) -> Listing:
    """ModelScope; public models only, no token is sent. Raises HubLookupError, or UserError: unknown revision.

    Its HTTP API is used directly: the library accepts no commit as revision (modelscope#1386), reads a pickled token
    from the home folder, and writes a session id there that it sends with the user's name (modelscope_hub 0.5.1,
    config.py).
    """
    name = f"{repo} on {_host(endpoint)}"
    url = f"{endpoint}/api/v1/models/{repo}/repo/files"
    try:
        body = _with_retries(lambda: _get_json(url, {"Revision": revision, "Recursive": "True"}, {}))
        data = body.get("Data") or {}
        entries = data.get("Files")
        if not body.get("Success", True):
            raise HubLookupError(f"{name}: {body.get('Message')}", "check the name")
        if entries is None:  # the hub's response, with status 200, to an unknown revision
            raise UserError(
                f"{name} has no revision {revision}", "name another one with --revision, for example master"
            )
        return _modelscope_listing(repo, data, [entry for entry in entries if entry["Type"] == "blob"])
    except httpx2.HTTPError as error:
        raise _http_error(error, name) from error
    except NOT_A_LISTING as error:
        raise HubLookupError(
            f"{name}: the response is not that of ModelScope ({error!r})", "check MODELSCOPE_ENDPOINT"
        ) from error


def _modelscope_listing(repo: str, data: dict[str, Any], blobs: list[dict[str, Any]]) -> Listing:
    commit = _modelscope_commit(data, blobs)
    files = [
        HubFile(
            path=entry["Path"],
            size=int(entry["Size"]),
            # the last commit that changed the file: same content as at `commit`, and the id is always complete
            commit=entry.get("Revision") or commit,
            digest=(entry.get("Sha256") or "").lower(),
        )
        for entry in blobs
    ]
    return Listing(repo, commit, _without_duplicates(files))


def _modelscope_commit(data: dict[str, Any], blobs: list[dict[str, Any]]) -> str:
    """The commit of the listing. The hub often leaves `Id` empty and gives only the first 8 digits in `ShortId`."""
    latest = data.get("LatestCommitter") or {}
    head: str = latest.get("Id") or latest.get("ShortId") or ""
    newest_first = sorted(blobs, key=lambda entry: -(entry.get("CommittedDate") or 0))
    commits: list[str] = [entry.get("Revision") or "" for entry in newest_first]
    commit = next((commit for commit in commits if commit.startswith(head)), head)
    if not commit:
        raise ValueError("no commit")
    return commit


def _get_json(url: str, params: dict[str, str], headers: dict[str, str]) -> dict[str, Any]:
    """The JSON object of a response. Raises httpx2.HTTPError, HubLookupError: too large or slow, or NOT_A_LISTING."""
    with get_session().stream("GET", url, params=params, headers=headers, timeout=TIMEOUT) as response:
        if not response.is_success:  # without its body, which can be endless as well and is shown nowhere
            hf_raise_for_status(
                httpx2.Response(response.status_code, headers=response.headers, request=response.request)
            )
        text = _read_body(response)
    try:
        body = parse_json(text, f"the response of {response.url.host}")
    except UserError as error:
        raise ValueError(error.problem) from error
    if not isinstance(body, dict):
        raise TypeError("not an object")
    return body


def _read_body(response: httpx2.Response) -> bytes:
    body, end = bytearray(), time.monotonic() + MAX_LISTING_SECONDS
    for block in response.iter_bytes():
        body += block
        if len(body) > MAX_LISTING_BYTES or time.monotonic() > end:
            limit = f"{MAX_LISTING_BYTES >> 20} MB" if len(body) > MAX_LISTING_BYTES else f"{MAX_LISTING_SECONDS:g} s"
            raise HubLookupError(f"{response.url.host} lists files in more than {limit}", "use another mirror")
    return bytes(body)


def _with_retries(request: Callable[[], Result]) -> Result:
    """Repeat a request after a transient error; a hub that cannot be reached at all is not tried again."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return request()
        except (httpx2.RequestError, httpx2.HTTPStatusError, HfHubHTTPError) as error:
            unreachable = isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.UnsupportedProtocol)
            if unreachable or _status(error) not in TRANSIENT_STATUSES | {None} or attempt == MAX_ATTEMPTS:
                raise
            time.sleep(RETRY_WAIT_SECONDS * 2 ** (attempt - 1))
    raise AssertionError("the last attempt returns or raises")


def _http_error(error: httpx2.HTTPError, name: str) -> UserError:
    status = _status(error)
    if status in (401, 403):
        return UserError(f"access to {name} is denied ({status})", SET_TOKEN)
    if status == 404:
        return HubLookupError(f"{name} does not exist", "check the name")
    if status:
        return HubLookupError(f"{name}: the hub responds with status {status}", "try again later")
    return HubLookupError(
        f"{name} cannot be reached ({error or type(error).__name__})",
        "check the network, or set HF_ENDPOINT to a mirror",
    )


def _status(error: httpx2.HTTPError) -> int | None:
    response: httpx2.Response | None = getattr(error, "response", None)
    return None if response is None else response.status_code


def _host(endpoint: str) -> str:
    """Host of an endpoint; the whole URL may contain a password."""
    return httpx2.URL(endpoint).host
