"""Some thousands of requests that nobody would send on purpose: none may end in a 500, hang, or lose a slot."""

import json
import random
import string
from collections import Counter

import pytest
import schemathesis
from asgi import ask, data_lines
from broken_grammar import Grammar
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from scripted_engine import ScriptedEngine, wait_until
from serving_process import SCRIPTED, serving

from entrypoints.api.app import create_app
from entrypoints.api.auth import KeyRing
from entrypoints.api.server import Options, Serving
from entrypoints.checkpoint.tokenizer import load_tokenizer

CHAT = "/v1/chat/completions"
SEED = 20240607
CASES = 3000
EXAMPLES = 40  # of each operation that takes a body, right and wrong
OPERATIONS = (
    "POST /v1/chat/completions", "POST /v1/completions", "POST /tokenize", "GET /v1/models", "GET /v1/models/{name}",
    "GET /healthz", "GET /readyz", "GET /metrics",
)  # fmt: skip


@pytest.fixture(scope="module")
def fuzzed(toy_native, tmp_path_factory):
    log = tmp_path_factory.mktemp("fuzz") / "log"
    with serving([*SCRIPTED, "--model", toy_native, "--served-model-name", "toy", "--slots", "2"], log) as server:
        yield server.wait_ready()


@pytest.fixture(scope="module")
def operations(fuzzed):
    """Every operation of the server's own document, by name."""
    found = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json").get_all_operations()
    return {operation.label: operation for operation in (result.ok() for result in found)}


@pytest.fixture(scope="module")
def seen():
    """How often each status came."""
    return Counter()


def test_the_document_tells_every_route(operations):
    assert set(operations) == set(OPERATIONS)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_request_after_the_document_ends_in_a_500(name, mode, operations, seen):
    """Those that keep to the document and those that break it."""

    @settings(
        max_examples=EXAMPLES if name.startswith("POST") else 10,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(operations[name].as_strategy(generation_mode=mode))
    def check(case):
        if mode == GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body["model"] = "toy"  # any other would be a 404
        response = case.call(timeout=60)
        seen[response.status_code] += 1
        assert response.status_code < 500, response.text
        assert response.headers["x-request-id"]
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    try:
        check()
    except Unsatisfiable:
        assert name.startswith("GET"), "what has no body can hardly be broken"


def test_the_server_that_met_them_all_is_well(fuzzed, seen):
    assert sum(seen.values()) > 200, seen
    assert seen[200] > 20, seen
    assert seen[400] > 50, seen
    wait_until(lambda: fuzzed.metric("glm_running") == fuzzed.metric("glm_queue_length") == 0)
    assert "Traceback" not in fuzzed.log
    answer = fuzzed.post(CHAT, {"messages": [{"role": "user", "content": "say 好"}]})
    assert answer["choices"][0]["message"]["content"] == "好"


@pytest.fixture
def app(toy_native):
    serving = Serving(Options("toy", slots=2), KeyRing(), "scripted")
    serving.engine = ScriptedEngine(load_tokenizer(toy_native), window=20_000)
    yield create_app(serving)
    serving.close()


def test_broken_messages_and_tool_calls_never_end_in_a_500(app):
    grammar, seen, called = Grammar(SEED), Counter(), 0
    for number in range(CASES):
        body = grammar.body()
        reply = ask(app, "POST", CHAT, body)
        seen[reply.status] += 1
        assert reply.status in (200, 400), (number, body, reply.body)
        if reply.status == 400:
            assert reply.error()["message"]
        elif body.get("stream"):
            *events, last = data_lines(reply.body)
            assert last == "[DONE]", (number, body)
            called += any("tool_calls" in event for event in events)
        else:
            called += any("tool_calls" in choice["message"] for choice in reply.json()["choices"])
    assert seen[200] > CASES / 5, seen
    assert seen[400] > CASES / 5, seen
    assert called > CASES / 60, "some of the calls are whole"
    admission = app.state.serving.admission
    assert (admission.running, admission.waiting, app.state.serving.engine.running) == (0, 0, 0)


def test_every_cut_of_a_tool_call_reads_alike_streamed_and_whole(app):
    tools = [{"type": "function", "function": {"name": "get_weather"}}]
    grammar = Grammar(SEED + 1)
    for _ in range(150):
        fields = {"messages": [{"role": "user", "content": "raw " + grammar.answer()}], "tools": tools}
        fields["max_tokens"] = grammar.chance.randrange(1, 40)
        choice = ask(app, "POST", CHAT, fields).json()["choices"][0]
        events = ask(app, "POST", CHAT, {**fields, "stream": True}).events()
        deltas = [part["delta"] for event in events for part in event["choices"]]
        assert "".join(delta.get("content") or "" for delta in deltas) == (choice["message"]["content"] or "")
        streamed = [call["function"] for delta in deltas for call in delta.get("tool_calls", [])]
        assert streamed == [call["function"] for call in choice["message"].get("tool_calls", [])]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/tokenize"])
def test_bytes_by_chance_never_end_in_a_500(app, path):
    chance = random.Random(SEED)
    whole = json.dumps({"messages": [{"role": "user", "content": "say 好"}], "prompt": "x"}).encode()
    for _ in range(300):
        spoilt = bytearray(whole)
        for _ in range(chance.randrange(1, 6)):
            spoilt[chance.randrange(len(spoilt))] = chance.choice(string.printable.encode() + b"\xff\x00\xc3")
        assert ask(app, "POST", path, bytes(spoilt)).status in (200, 400, 404)
