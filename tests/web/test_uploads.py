"""Uploads to the pages, damaged by chance: Gradio's route is blocked, Streamlit's takes one file or none."""

import http.client
import random
import tempfile
import types
from collections import Counter
from pathlib import Path

import psutil
import pytest
from asgi import send
from fuzzing import FuzzSettings, case_of
from starlette.applications import Starlette
from streamlit.runtime.memory_uploaded_file_manager import MemoryUploadedFileManager
from streamlit.web.server.starlette.starlette_routes import create_upload_routes

from entrypoints.web import body_limit
from entrypoints.web.access import AccessMiddleware

pytestmark = pytest.mark.slow

CANARY = "canary-of-an-upload"
GRADIO_PATHS = (
    "/gradio_api/upload",
    "/gradio_api/upload/",
    "/gradio_api/upload?upload_id=1",
    "//gradio_api/upload",
    "/upload",
    "/gradio_api//upload",
    "/gradio_api/%75pload",
    "/gradio_api/upload%2f",
    "/gradio_api/./upload",
    "/gradio_api/UPLOAD",
    "/x/../gradio_api/upload",
    "/gradio_api/upload;x",
    "/gradio_api/upload%00",
    "/gradio_api%2fupload",
    "/%2e/gradio_api/upload",
)
STREAMLIT_PATH = "/_stcore/upload_file/session/1"
PIECES = (
    b"\r\n",
    b"\n",
    b"--",
    b"--b",
    b"--b--",
    b"\x00",
    b"\xff",
    b'filename="',
    b'name="',
    b"Content-Disposition: form-data;",
    b"Content-Transfer-Encoding: base64\r\n",
    b"Content-Type: multipart/mixed; boundary=b\r\n",
    b"a" * 9000,
    b": ",
    b"../" * 40,
)


def multipart(chance: random.Random) -> tuple[str, bytes]:
    """Content type and body of an upload, most of them damaged."""
    name = chance.choice([CANARY, f"../../{CANARY}", f"{CANARY}\x00.txt", "好", "", 'a"; filename="b', "x" * 5000])
    part = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    body = bytearray((part + chance.randbytes(chance.randrange(2000)) + b"\r\n") * chance.choice([1, 1, 1, 2, 40]))
    body += chance.choice([b"--b--\r\n", b"--b--\r\n", b"--b--\r\n", b"", b"--c--"])
    for _ in range(chance.choice([0, 0, 1, 3, 20])):
        start = chance.randrange(len(body))
        body[start : start + chance.randrange(4)] = chance.choice(PIECES)
    kind = chance.choice(
        ["multipart/form-data; boundary=b"] * 6
        + ["multipart/form-data", "text/plain", "multipart/form-data; boundary="]
    )
    return kind, bytes(body)


@pytest.mark.fuzz
def test_no_damaged_upload_reaches_a_folder_of_gradio(chat_pages):
    page, fuzz, seen = chat_pages("gradio"), FuzzSettings(), Counter()
    process = psutil.Process(page.process.popen.pid)
    before = process.memory_info().rss
    for number in fuzz.cases(150):
        chance = random.Random(f"gradio {fuzz.seed} {number}")
        kind, body = multipart(chance)
        method, path = chance.choice(["POST", "POST", "PUT"]), chance.choice(GRADIO_PATHS)
        with case_of("uploads and gradio", fuzz.seed, number):
            connection = http.client.HTTPConnection(page.host.removeprefix("http://"), timeout=60)
            chunked = chance.random() < 0.3
            connection.request(
                method, path, iter([body]) if chunked else body, {"content-type": kind}, encode_chunked=chunked
            )
            status = connection.getresponse().status
            connection.close()
            assert status in (400, 403, 404, 405), (method, path)
        seen[status] += 1
    print(f"fuzz uploads to Gradio: seed {fuzz.seed}, {dict(seen)}")
    assert not [*Path(tempfile.gettempdir(), "gradio").rglob(f"*{CANARY}*")]
    assert process.memory_info().rss - before < 100 << 20


@pytest.fixture
def streamlit_uploads():
    """Streamlit's route behind ours for a visitor with a session, and the files it keeps."""
    kept = MemoryUploadedFileManager("/_stcore/upload_file")
    runtime = types.SimpleNamespace(is_active_session=lambda session: session == "session")
    routes = create_upload_routes(runtime, kept, None)
    return AccessMiddleware(Starlette(routes=routes)), kept


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # parts of a damaged body are not closed
def test_streamlit_takes_one_file_or_rejects_a_damaged_upload(streamlit_uploads, monkeypatch):
    app, kept = streamlit_uploads
    monkeypatch.setattr("streamlit.web.server.starlette.starlette_routes.is_xsrf_enabled", lambda: False)
    fuzz, seen = FuzzSettings(), Counter()
    for number in fuzz.cases(300):
        chance = random.Random(f"streamlit {fuzz.seed} {number}")
        kind, body = multipart(chance)
        cut = chance.randrange(1, len(body))
        content = (body[:cut], body[cut:]) if chance.random() < 0.3 else body
        with case_of("uploads and streamlit", fuzz.seed, number):
            status = send(
                app, "PUT", STREAMLIT_PATH, content, headers={"content-type": kind, "host": "localhost"}
            ).status
            assert status in (204, 400, 413)
        seen[status] += 1
        kept.remove_session_files("session")
    print(f"fuzz uploads to Streamlit: seed {fuzz.seed}, {dict(seen)}")
    if not fuzz.case:
        assert min(seen[204], seen[400]) > 20, seen


async def _reads_all(scope, receive, send):
    """As the libraries of the pages: the whole body is in memory before it is parsed."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client has disconnected")
        body += message["body"]
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"%d" % len(body)})


@pytest.mark.parametrize(("size", "status"), [(1000, 200), (1001, 413), (10_000, 413)])
@pytest.mark.parametrize("chunk", [300, 20_000])
def test_a_body_above_the_limit_is_rejected_before_the_page_has_it(size, status, chunk, monkeypatch):
    """With and without Content-Length: `chunk` is the size of the parts that arrive."""
    monkeypatch.setattr(body_limit, "MAX_BODY_BYTES", 1000)
    body = b"x" * size
    content = body if chunk > size else tuple(body[start : start + chunk] for start in range(0, size, chunk))
    reply = send(AccessMiddleware(_reads_all), "POST", "/", content, headers={"host": "localhost"})
    assert (reply.status, reply.body) == (status, b"1000" if status == 200 else b"the request body is too large\n")
