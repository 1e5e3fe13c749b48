"""llama.cpp's server inside the process: how it ends, that it prints nothing, and that no one else can reach it."""

import contextlib
import tempfile
import threading
from pathlib import Path

import httpx2
import psutil
import pytest

from entrypoints.chat_format.sampling import Sampling
from entrypoints.engines.llamacpp.engine import LlamaCppEngine
from entrypoints.engines.options import EngineOptions
from entrypoints.errors import UserError

GREEDY = Sampling(max_new_tokens=24, temperature=0)
# every route of llama.cpp's server; a route that is missing here is still protected by the socket
ROUTES = [
    *(("GET", path) for path in ("models", "v1/models", "props", "metrics", "slots", "lora-adapters", "v1/stream")),
    *(("GET", path) for path in ("cors-proxy", "tools", "", "index.html", "api/tags")),
    *(("POST", path) for path in ("completion", "completions", "v1/completions", "chat/completions", "responses")),
    *(("POST", path) for path in ("v1/chat/completions", "v1/chat/completions/control", "v1/responses", "v1/messages")),
    *(("POST", path) for path in ("infill", "embedding", "embeddings", "v1/embeddings", "rerank", "v1/rerank")),
    *(("POST", path) for path in ("tokenize", "detokenize", "apply-template", "props", "slots/0", "lora-adapters")),
    *(("POST", path) for path in ("v1/streams/lookup", "cors-proxy", "tools", "v1/audio/transcriptions")),
]


def test_closing_the_engine_ends_running_answers_with_an_error(toy_gguf, prompts):
    engine = LlamaCppEngine.load(toy_gguf, EngineOptions(slots=1, threads=1))
    answer = engine.generate(prompts[0], Sampling(max_new_tokens=1000))
    next(answer)
    engine.close()
    with pytest.raises(RuntimeError, match="the engine was closed"):
        list(answer)
    with pytest.raises(RuntimeError, match="the engine was closed"):
        next(engine.generate(prompts[0], GREEDY))
    engine.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "llama" and thread.is_alive()]


def listeners():
    return {c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}


def test_llama_cpps_own_server_cannot_be_reached(toy_gguf):
    """It would bypass API keys: no port is opened, and its socket file is deleted."""
    before = listeners()
    engine = LlamaCppEngine.load(toy_gguf, EngineOptions(slots=1, threads=1))
    assert listeners() == before
    address = engine._streams._server.listening_address
    assert address.startswith("unix:///")
    assert not Path(address.removeprefix("unix://")).parent.exists()
    engine.close()


def test_llama_cpps_own_server_answers_no_request_without_its_key(toy_gguf, monkeypatch):
    """The second protection, in case the first one fails: in this test the socket file remains."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "TemporaryDirectory", lambda **_: contextlib.nullcontext(folder))
        engine = LlamaCppEngine.load(toy_gguf, EngineOptions(slots=1, threads=1))
        transport = httpx2.HTTPTransport(uds=f"{folder}/llama.sock")
        with httpx2.Client(transport=transport, base_url="http://llama") as client:
            codes = {f"{method} {path}": client.request(method, f"/{path}").status_code for method, path in ROUTES}
            assert client.get("/health").text == '{"status":"ok"}'
        engine.close()
    assert len(codes) >= 37
    assert {route: code for route, code in codes.items() if code not in (401, 404)} == {}


def test_an_engine_can_be_closed_as_soon_as_it_is_loaded(toy_gguf):
    """llama.cpp's server hangs if it is stopped before its loop runs, which happens on a busy machine."""
    for _ in range(5):
        LlamaCppEngine.load(toy_gguf, EngineOptions(slots=1, threads=1)).close()


def test_nothing_is_printed(toy_gguf, prompts, capfd):
    """Stdout contains the answer only."""
    engine = LlamaCppEngine.load(toy_gguf, EngineOptions(slots=1, threads=1))
    list(engine.generate(prompts[0], GREEDY))
    engine.close()
    assert capfd.readouterr() == ("", "")


def test_a_file_that_llama_cpp_cannot_load_is_named(toy_gguf, tmp_path):
    content = toy_gguf.read_bytes().replace(b"blk.0.attn_norm.weight", b"blk.0.attn_morn.weight")
    (tmp_path / "odd.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"llama\.cpp cannot load .*odd\.gguf"):
        LlamaCppEngine.load(tmp_path / "odd.gguf", EngineOptions(slots=1))
