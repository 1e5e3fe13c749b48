"""Simulated hubs: HTTP servers on 127.0.0.1 with the routes of Hugging Face and ModelScope."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import huggingface_hub
import pytest

from entrypoints.hub import listing, transfer
from entrypoints.hub.download import KNOWN_MODELS
from entrypoints.settings import Secret, Settings

COMMIT = "c0ffee" + "0" * 34
LATER_COMMIT = "decaf0" + "0" * 34
LFS_FROM_BYTES = 100  # smaller files are plain git blobs

FILES = {
    "config.json": b'{"model_type": "chatglm"}',
    "tokenizer.model": b"pieces" * 50,
    "tokenizer_config.json": b"{}",
    "generation_config.json": b"{ }",
    "special_tokens_map.json": b"",
    "MODEL_LICENSE": b"terms",
    "README.md": b"# ChatGLM3",
    "model-00001-of-00002.safetensors": bytes(range(256)) * 40,
    "model-00002-of-00002.safetensors": bytes(reversed(range(256))) * 30,
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "pytorch_model-00001-of-00001.bin": b"pickle" * 100,
    "pytorch_model.bin.index.json": b'{"weight_map": {}}',
    "modeling_chatglm.py": b"raise SystemExit",
    "tokenization_chatglm.py": b"raise SystemExit",
    "model.onnx": b"onnx" * 100,
    "tf_model.h5": b"h5" * 100,
    "model-q4.gguf": b"gguf" * 100,
    "old/model.safetensors": b"old" * 100,
}
WANTED = {  # of FILES
    "config.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "MODEL_LICENSE",
    "README.md",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
}


@dataclass
class RecordedRequest:
    """One request that a server received."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]


@dataclass
class Hub:
    """One hub with one repository; the fields below `requests` simulate failures."""

    repo: str
    revisions: dict[str, dict[str, bytes]] = field(default_factory=lambda: {COMMIT: dict(FILES)})
    branches: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "master": COMMIT})
    storage: "Hub | None" = None  # where large files are redirected to, as real hubs do
    requests: list[RecordedRequest] = field(default_factory=list)
    cuts: dict[str, list[int]] = field(default_factory=dict)  # file -> bytes after which each next response is cut off
    statuses: dict[str, list[int]] = field(default_factory=dict)  # end of path -> statuses of the next responses
    bodies: dict[str, bytes] = field(default_factory=dict)  # file -> body sent instead of its contents
    is_login_page: bool = False  # every response is HTML with status 200
    gated_status: int = 0  # of file requests without a token
    ignores_range: bool = False
    range_status: int = 206  # ModelScope uses 200
    gate: threading.Event = field(default_factory=threading.Event)  # files are sent once it is set
    port: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def requests_for(self, file: str) -> list[RecordedRequest]:
        """The requests for the contents of a file, at the host that sends them."""
        return [request for request in self.requests if request.method == "GET" and _requested_file(request) == file]

    def file_requests(self) -> list[RecordedRequest]:
        return [request for request in self.requests if _requested_file(request)]


def _requested_file(request: RecordedRequest) -> str:
    if request.path.endswith("/repo"):
        return request.query["FilePath"]
    found = re.search(r"(/resolve/[^/]+|/storage)/(.+)", request.path)
    return unquote(found[2]) if found else ""


class HubHandler(BaseHTTPRequestHandler):
    """The routes of both hubs."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise 40 ms per response

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        request = RecordedRequest(
            self.command, address.path, query, {name.lower(): value for name, value in self.headers.items()}
        )
        self.hub.requests.append(request)
        status = next(
            (rest.pop(0) for end, rest in self.hub.statuses.items() if address.path.endswith(end) and rest), 0
        )
        if status or self.hub.is_login_page:
            self.reply(status or 200, b"<html>")
        elif address.path.startswith("/api/v1/models/"):
            self.modelscope(request)
        elif address.path.startswith("/api/models/"):
            self.huggingface(request)
        else:
            self.file(request)

    do_HEAD = do_GET

    def huggingface(self, request: RecordedRequest) -> None:
        repo, revision = re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", request.path).groups()
        if repo == self.hub.repo.replace("zai-org/", "THUDM/") != self.hub.repo:  # the organization was renamed
            return self.reply(307, b"", {"Location": f"/api/models/{self.hub.repo}/revision/{revision}"})
        if repo != self.hub.repo:  # the real hub responds 401 if no token is sent
            return self.reply(
                404 if "authorization" in request.headers else 401, b"{}", {"X-Error-Code": "RepoNotFound"}
            )
        commit = self.hub.branches.get(unquote(revision), unquote(revision))
        if commit not in self.hub.revisions:
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = []
        for path, body in self.hub.revisions[commit].items():
            sibling = {"rfilename": path, "size": len(body), "blobId": blob_id(body)}
            if len(body) >= LFS_FROM_BYTES:
                sibling["lfs"] = {"size": len(body), "sha256": sha(body), "pointerSize": 134}
            siblings.append(sibling)
        return self.reply(200, json.dumps({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings}).encode())

    def modelscope(self, request: RecordedRequest) -> None:
        repo, rest = re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo(.*)", request.path).groups()
        if repo != self.hub.repo:
            return self.reply(404, json.dumps({"Code": 10010205001, "Message": "record not found"}).encode())
        commit = self.hub.branches.get(request.query["Revision"], request.query["Revision"])
        if not rest:
            return self.file(request)
        if commit not in self.hub.revisions:  # as the real hub responds
            return self.reply(200, json.dumps({"Code": 200, "Success": True, "Data": {"Files": None}}).encode())
        files = [
            {"Path": path, "Type": "blob", "Size": len(body), "Sha256": sha(body), "Revision": commit}
            for path, body in self.hub.revisions[commit].items()
        ]
        files.append({"Path": "old", "Type": "tree", "Size": 0})
        data = {"Files": files, "LatestCommitter": {"Id": "", "ShortId": commit[:8]}}
        return self.reply(200, json.dumps({"Code": 200, "Success": True, "Data": data}).encode())

    def file(self, request: RecordedRequest) -> None:
        file = _requested_file(request)
        given = request.query.get("Revision") or request.query.get("at") or request.path
        commit = self.hub.branches.get(given) or re.search("[0-9a-f]{40}", given)[0]
        body = self.hub.bodies.get(file, self.hub.revisions.get(commit, {}).get(file))
        if self.hub.gated_status and "authorization" not in request.headers:
            return self.reply(self.hub.gated_status, b"", {"X-Error-Code": "GatedRepo"})
        if body is None:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{blob_id(body)}"', "X-Repo-Commit": commit}
        if self.hub.storage and len(body) >= LFS_FROM_BYTES:
            headers |= {"X-Linked-Size": str(len(body)), "X-Linked-Etag": f'"{sha(body)}"'}
            headers["Location"] = f"{self.hub.storage.url}/storage/{quote(file)}?at={commit}&signature=sesame"
            return self.reply(302, b"", headers)
        self.hub.gate.wait(200)
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))
        if not wanted or self.hub.ignores_range:
            return self.reply(200, body, headers, file)
        start = int(wanted[1])
        if start >= len(body):
            return self.reply(416, b"", {"Content-Range": f"bytes */{len(body)}"})
        headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return self.reply(self.hub.range_status, body[start:], headers, file)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None, file: str = "") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = self.hub.cuts[file].pop(0) if self.hub.cuts.get(file) else None
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def sha(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def blob_id(body: bytes) -> str:
    """As printed by `git hash-object`."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@contextlib.contextmanager
def _served(hub: Hub) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": hub}))
    server.daemon_threads = True
    hub.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def storage() -> Iterator[Hub]:
    """The host to which Hugging Face redirects requests for large files."""
    with _served(Hub(repo="")) as hub:
        yield hub


@pytest.fixture
def huggingface(storage: Hub) -> Iterator[Hub]:
    with _served(Hub(repo="zai-org/chatglm3-6b", storage=storage)) as hub:
        hub.revisions[KNOWN_MODELS["THUDM/chatglm3-6b"]["huggingface"].revision] = dict(FILES)
        storage.revisions = hub.revisions
        yield hub


@pytest.fixture
def modelscope() -> Iterator[Hub]:
    with _served(Hub(repo="ZhipuAI/chatglm3-6b", range_status=200)) as hub:
        yield hub


@pytest.fixture
def settings(huggingface: Hub, modelscope: Hub) -> Settings:
    """Endpoints of both simulated hubs; the token must not leak."""
    return Settings(hf_endpoint=huggingface.url, modelscope_endpoint=modelscope.url, hf_token=Secret("hf_opensesame"))


@pytest.fixture(autouse=True)
def fast_and_isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No wait before retries, no proxy, not offline; connections are closed after the test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(listing, "RETRY_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(transfer, "RETRY_WAIT_SECONDS", 0.0)
    monkeypatch.setenv("NO_PROXY", "*")
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The target of a download; does not exist yet."""
    return tmp_path / "out"


@pytest.fixture
def hub_files() -> dict[str, bytes]:
    return FILES


@pytest.fixture
def wanted() -> set[str]:
    return WANTED


@pytest.fixture
def commit() -> str:
    return COMMIT


@pytest.fixture
def later() -> str:
    return LATER_COMMIT
