"""/v1/embeddings: OpenAI's format, the model's limits, and its own place beside the chat model."""

import asyncio
import base64
import struct
import threading

import pytest
from asgi import run, send, send_async

from entrypoints.api.auth import KeyRing, digest
from entrypoints.api.usage import UsageLedger, day_files, read_records
from entrypoints.engines.llamacpp.embeddings import Embedding, InputTooLong

EMBEDDINGS = "/v1/embeddings"


class CountingEmbedder:
    """The vector of an input is its length; `gate` holds calls back, `running` and `most` count them."""

    size, vocab_size, max_tokens, slots = 3, 1000, 8, 4

    def __init__(self):
        self.gate, self.lock = threading.Event(), threading.Lock()
        self.gate.set()
        self.running = self.most = self.calls = 0

    def embed(self, text):
        with self.lock:
            self.running += 1
            self.calls += 1
            self.most = max(self.most, self.running)
        try:
            assert self.gate.wait(30)
            if len(text) > self.max_tokens:
                raise InputTooLong(len(text), self.max_tokens)
            if text == "fail":
                raise RuntimeError("a defect")
            return Embedding([float(len(text)), 0.5, -1 / 3], len(text))
        finally:
            with self.lock:
                self.running -= 1

    def close(self):
        pass


@pytest.fixture
def embedder():
    return CountingEmbedder()


@pytest.fixture
def app(make_app, embedder):
    return make_app(embedder=embedder, embeddings="bge")


def embed(app, given, **fields):
    return send(app, "POST", EMBEDDINGS, {"input": given, **fields})


def test_a_response_has_openais_format(app):
    assert embed(app, ["ab", "abcd"], model="bge").json() == {
        "object": "list",
        "model": "bge",
        "usage": {"prompt_tokens": 6, "total_tokens": 6},
        "data": [
            {"object": "embedding", "index": 0, "embedding": [2.0, 0.5, -1 / 3]},
            {"object": "embedding", "index": 1, "embedding": [4.0, 0.5, -1 / 3]},
        ],
    }


@pytest.mark.parametrize(
    ("given", "lengths"),
    [("abc", [3]), (["abc"], [3]), ([7, 8], [2]), ([[7], [7, 8, 9]], [1, 3]), (["x"] * 100, [1] * 100)],
)  # fmt: skip
def test_texts_and_token_ids_are_accepted_alone_and_in_lists(app, given, lengths):
    data = embed(app, given).json()["data"]
    assert [one["embedding"][0] for one in data] == lengths
    assert [one["index"] for one in data] == [*range(len(lengths))]


def test_base64_holds_the_same_numbers_as_little_endian_float32(app):
    text = embed(app, "abc", encoding_format="base64").json()["data"][0]["embedding"]
    assert struct.unpack("<3f", base64.b64decode(text)) == pytest.approx([3, 0.5, -1 / 3])


@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        ({"input": ["ok", "much too long"]}, 400, "input.1", "13 tokens, the limit is 8"),
        ({"input": "much too long"}, 400, "input", "13 tokens, the limit is 8"),
        ({"input": [[1] * 9]}, 400, "input.0", "9 tokens, the limit is 8"),
        ({"input": ["a", ""]}, 400, "input.1", "empty"),
        ({"input": [[1], [2, 1000]]}, 400, "input.1", "1000 is not below 1000"),
        ({"input": []}, 400, "input", "at least 1"),
        ({"input": ["x"] * 2049}, 400, "input", "at most 2048"),
        ({"input": ["a", 1]}, 400, "input.1", "string"),
        ({"input": ["a", "\ud800"]}, 400, "input.1", "half a character"),
        ({"input": {"a": 1}}, 400, "input", "a text, token ids or a list of either"),
        ({}, 400, "input", "required"),
        ({"input": "a", "dimensions": 2}, 400, "dimensions", "have 3 dimensions"),
        ({"input": "a", "encoding_format": "hex"}, 400, "encoding_format", "float"),
        ({"input": "a", "truncate": True}, 400, "truncate", "not permitted"),
        ({"input": "a", "model": "toy"}, 404, "model", "available models: bge"),
    ],
)
def test_an_invalid_request_is_rejected_by_name(app, fields, status, param, words):
    reply = send(app, "POST", EMBEDDINGS, fields)
    assert (reply.status, reply.error()["param"]) == (status, param)
    assert words in reply.error()["message"]


def test_fields_that_change_nothing_are_accepted(app):
    assert embed(app, "a", dimensions=3, user="u", encoding_format=None, model=None, extra=None).status == 200


def test_a_defect_is_a_500_without_details(app):
    assert embed(app, "fail").status == 500
    assert "defect" not in embed(app, "fail").body.decode()


def test_both_models_are_listed_and_each_answers_only_its_own_requests(app):
    models = send(app, "GET", "/v1/models").json()["data"]
    assert [(model["id"], model["max_model_len"]) for model in models] == [("toy", 2048), ("bge", 8)]
    assert send(app, "GET", "/v1/models/bge").json()["parent"] is None
    message = {"role": "user", "content": "say x"}
    reply = send(app, "POST", "/v1/chat/completions", {"model": "bge", "messages": [message]})
    assert (reply.status, reply.error()["code"]) == (404, "model_not_found")


def test_a_server_without_an_embedding_model_says_so(make_app):
    error = embed(make_app(), "a").error()
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "--embeddings" in error["message"]


def test_a_server_of_embeddings_alone_has_no_chat(make_app, embedder):
    app = make_app(engine=None, model=None, embedder=embedder, embeddings="bge")
    assert [model["id"] for model in send(app, "GET", "/v1/models").json()["data"]] == ["bge"]
    assert send(app, "GET", "/readyz").json() == {
        "status": "ready", "model": None, "adapters": [], "embeddings": "bge"
    }  # fmt: skip
    assert embed(app, "abc").status == 200
    for path, body in (("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
                       ("/v1/responses", {"input": "x"}), ("/v1/completions", {"prompt": "x"})):  # fmt: skip
        reply = send(app, "POST", path, body)
        assert (reply.status, reply.error()["code"]) == (404, "model_not_found")
        assert "has no chat model" in reply.error()["message"]


def test_a_model_that_still_loads_is_503(make_app):
    app = make_app(embeddings="bge")
    reply = embed(app, "a")
    assert (reply.status, reply.error()["code"]) == (503, "loading")
    assert send(app, "GET", "/readyz").status == 503


def test_keys_and_metrics_are_those_of_the_server(make_app, embedder):
    app = make_app(keys=KeyRing(single="secret"), embedder=embedder, embeddings="bge")
    assert embed(app, "abc").status == 401
    reply = send(app, "POST", EMBEDDINGS, {"input": "abc"}, headers={"authorization": "Bearer secret"})
    assert reply.status == 200
    metrics = send(app, "GET", "/metrics").body.decode()
    assert 'glm_prompt_tokens_total{model="bge"} 3.0' in metrics
    assert f'glm_requests_total{{path="{EMBEDDINGS}",status="200"}} 1.0' in metrics
    assert 'glm_engine_info{engine="llamacpp",model="bge"} 1.0' in metrics
    assert 'glm_key_prompt_tokens_total{key="default",model="bge"} 3.0' in metrics
    assert 'glm_key_requests_total{key="default",model="bge",outcome="completed"} 1.0' in metrics
    app.state.server.admission.draining = True
    assert send(app, "POST", EMBEDDINGS, {"input": "a"}, headers={"authorization": "Bearer secret"}).status == 503


def test_embeddings_count_for_the_quota_of_a_key(make_app, embedder, tmp_path):
    (tmp_path / "keys").write_text(f"anna {digest('glm-a')} 600 64 5\n")
    ledger = UsageLedger(tmp_path / "usage")
    app = make_app(keys=KeyRing(tmp_path / "keys"), usage=ledger, embedder=embedder, embeddings="bge")
    anna = {"authorization": "Bearer glm-a"}
    replies = [send(app, "POST", EMBEDDINGS, {"input": ["ab", "c"]}, headers=anna) for _ in range(3)]
    assert [reply.status for reply in replies] == [200, 200, 429]
    assert "used 6 of 5 tokens" in replies[2].error()["message"]
    (file,) = day_files(ledger.folder)
    records = list(read_records(file))
    assert [(one.key, one.model, one.outcome, one.prompt_tokens, one.completion_tokens) for one in records] == [
        ("anna", "bge", "completed", 3, 0)
    ] * 2


def test_the_queue_is_bounded_and_a_batch_counts_once(make_app, embedder):
    async def flood(app):
        queue = app.state.server.embedding_queue
        waiting = [asyncio.create_task(send_async(app, "POST", EMBEDDINGS, {"input": ["a"] * 20})) for _ in range(6)]
        while (queue.running, queue.waiting) != (4, 2):
            await asyncio.sleep(0.002)
        metrics = (await send_async(app, "GET", "/metrics")).body.decode()
        refused = await send_async(app, "POST", EMBEDDINGS, {"input": "a"})
        embedder.gate.set()
        return metrics, refused, await asyncio.gather(*waiting)

    app = make_app(embedder=embedder, embeddings="bge", queue=2)
    embedder.gate.clear()
    metrics, refused, replies = run(flood(app))
    assert "glm_running 4.0" in metrics
    assert "glm_queue_length 2.0" in metrics
    assert (refused.status, refused.error()["code"]) == (429, "queue_full")
    assert [reply.status for reply in replies] == [200] * 6
    assert embedder.most <= 4


def test_a_client_that_disconnects_stops_its_batch(app, embedder):
    embedder.gate.clear()
    reply = run(
        send_async(app, "POST", EMBEDDINGS, {"input": ["a"] * 200}, disconnect_when=lambda _: embedder.running == 4)
    )
    assert reply.status == 499
    embedder.gate.set()
    assert embed(app, "a").status == 200
    assert embedder.calls < 10
    queue = app.state.server.embedding_queue
    assert (queue.running, queue.waiting) == (0, 0)


def test_chat_is_answered_while_embeddings_wait(app, embedder):
    async def both():
        embedder.gate.clear()
        waiting = asyncio.create_task(send_async(app, "POST", EMBEDDINGS, {"input": "a"}))
        message = {"role": "user", "content": "say x"}
        chat = await send_async(app, "POST", "/v1/chat/completions", {"messages": [message]})
        embedder.gate.set()
        return chat, await waiting

    assert [reply.status for reply in run(both())] == [200, 200]
