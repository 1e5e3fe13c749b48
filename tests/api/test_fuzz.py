"""Thousands of generated and damaged requests: none may cause a 500, hang, or leak a slot."""

import json
import random
import string
from collections import Counter

import pytest
import schemathesis
from asgi import data_lines, send
from broken_grammar import Grammar
from fuzzing import FuzzSettings, case_of
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from scripted_engine import ScriptedEngine, wait_until
from serving_process import SCRIPTED, serving

from entrypoints.api.app import create_app
from entrypoints.api.auth import KeyRing
from entrypoints.api.state import ServerOptions, ServerState
from entrypoints.checkpoint.tokenizer import load_tokenizer

CHAT = "/v1/chat/completions"
SEED = 20240607
CASES = 4000
EXAMPLES = 40  # per operation with a body, valid and invalid
OPERATIONS = (
    "POST /v1/chat/completions", "POST /v1/completions", "POST /v1/responses", "POST /v1/embeddings",
    "POST /tokenize", "GET /v1/models", "GET /v1/models/{name}", "GET /healthz", "GET /readyz", "GET /metrics",
)  # fmt: skip


@pytest.fixture(scope="module")
def fuzzed(toy_native, tmp_path_factory):
    log = tmp_path_factory.mktemp("fuzz") / "log"
    with serving([*SCRIPTED, "--model", toy_native, "--served-model-name", "toy", "--slots", "2"], log) as server:
        yield server.wait_ready()


@pytest.fixture(scope="module")
def operations(fuzzed):
    """Every operation of the server's OpenAPI document, by name."""
    found = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json").get_all_operations()
    return {operation.label: operation for operation in (result.ok() for result in found)}


@pytest.fixture(scope="module")
def seen():
    """Number of responses by status."""
    return Counter()


@pytest.mark.slow
def test_the_openapi_document_lists_every_route(operations):
    assert set(operations) == set(OPERATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_generated_request_causes_a_500(name, mode, operations, seen):
    """Requests that satisfy the OpenAPI document and requests that violate it."""

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
            case.body["model"] = "toy"  # any other name is a 404
        response = case.call(timeout=60)
        seen[response.status_code] += 1
        assert response.status_code < 500, response.text
        assert response.headers["x-request-id"]
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    try:
        check()
    except Unsatisfiable:
        assert name.startswith("GET"), "only a request without a body has no invalid variant"


@pytest.mark.slow
def test_the_server_works_after_all_generated_requests(fuzzed, seen):
    assert sum(seen.values()) > 200, seen
    assert seen[200] > 20, seen
    assert seen[400] > 50, seen
    wait_until(lambda: fuzzed.metric("glm_running") == fuzzed.metric("glm_queue_length") == 0)
    assert "Traceback" not in fuzzed.log
    answer = fuzzed.post(CHAT, {"messages": [{"role": "user", "content": "say 好"}]})
    assert answer["choices"][0]["message"]["content"] == "好"


@pytest.fixture
def app(toy_native):
    state = ServerState(ServerOptions("toy", slots=2), KeyRing(), "scripted")
    state.engine = ScriptedEngine(load_tokenizer(toy_native), context_length=20_000)
    yield create_app(state)
    state.close()


def answer_of(app, body):
    """Status of the response to a chat request, and whether it contains a tool call."""
    reply = send(app, "POST", CHAT, body)
    assert reply.status in (200, 400), (body, reply.body)
    if reply.status == 400:
        assert reply.error()["message"]
        return 400, False
    if body.get("stream"):
        *events, last = data_lines(reply.body)
        assert last == "[DONE]", body
        return 200, any("tool_calls" in event for event in events)
    return 200, any("tool_calls" in choice["message"] for choice in reply.json()["choices"])


@pytest.mark.slow
@pytest.mark.fuzz
def test_invalid_messages_and_tool_calls_never_cause_a_500(app):
    fuzz, seen, called = FuzzSettings(), Counter(), 0
    for number in fuzz.cases(CASES):
        with case_of("invalid_messages", fuzz.seed, number):
            status, has_call = answer_of(app, Grammar(f"{fuzz.seed} {number}").body())
        seen[status] += 1
        called += has_call
    print(f"fuzz invalid_messages: seed {fuzz.seed}, {seen.total()} requests, {dict(seen)}, {called} with a tool call")
    if seen.total() >= CASES:
        assert seen[200] > seen.total() / 5, seen
        assert seen[400] > seen.total() / 5, seen
        assert called > seen.total() / 150, "some of the calls are complete"  # one in 60 to 70, depending on the seed
    admission = app.state.server.admission
    assert (admission.running, admission.waiting, app.state.server.engine.running) == (0, 0, 0)


def test_invalid_items_never_cause_a_500(app):
    """The messages of the chat requests as items, with their broken fields, and items that are broken themselves."""
    grammar, seen = Grammar(SEED + 2), Counter()
    for number in range(CASES // 10):
        chat = grammar.body()
        items = chat.get("messages")
        if isinstance(items, list):
            items = [item for message in items for item in items_of(message, grammar)]
        tools = [{"type": "function", "name": "clock"}, grammar.value()] if grammar.chance.random() < 0.2 else None
        body = {"input": items, "tools": tools, "stream": chat.get("stream"), "instructions": grammar.text()}
        reply = send(app, "POST", "/v1/responses", body)
        seen[reply.status] += 1
        assert reply.status in (200, 400), (number, body, reply.body)
    assert seen[200] > CASES / 100, seen
    assert seen[400] > CASES / 100, seen
    assert app.state.server.engine.running == 0


def items_of(message, grammar):
    """A message of a chat request as items of /v1/responses; anything else stays as it is."""
    if not isinstance(message, dict):
        return [message]
    calls = message.get("tool_calls")
    calls = [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    functions = [call.get("function") for call in calls if isinstance(call.get("function"), dict)]
    items = [{"type": "function_call", "call_id": grammar.text(), **function} for function in functions]
    if message.get("role") == "tool":
        id_ = message.get("tool_call_id")
        return [*items, {"type": "function_call_output", "call_id": id_, "output": message.get("content")}]
    fields = ("role", "content", "name") if grammar.chance.random() < 0.1 else ("role", "content")
    return [{name: message.get(name) for name in fields}, *items]


def test_a_tool_call_cut_anywhere_is_equal_streamed_and_complete(app):
    tools = [{"type": "function", "function": {"name": "get_weather"}}]
    grammar = Grammar(SEED + 1)
    for _ in range(150):
        fields = {"messages": [{"role": "user", "content": "raw " + grammar.answer()}], "tools": tools}
        fields["max_tokens"] = grammar.chance.randrange(1, 40)
        choice = send(app, "POST", CHAT, fields).json()["choices"][0]
        events = send(app, "POST", CHAT, {**fields, "stream": True}).events()
        deltas = [part["delta"] for event in events for part in event["choices"]]
        assert "".join(delta.get("content") or "" for delta in deltas) == (choice["message"]["content"] or "")
        streamed = [call["function"] for delta in deltas for call in delta.get("tool_calls", [])]
        assert streamed == [call["function"] for call in choice["message"].get("tool_calls", [])]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/embeddings", "/tokenize"])
def test_random_bytes_never_cause_a_500(app, path):
    chance = random.Random(SEED)
    body = json.dumps({"messages": [{"role": "user", "content": "say 好"}], "prompt": "x", "input": "say 好"}).encode()
    for _ in range(300):
        damaged = bytearray(body)
        for _ in range(chance.randrange(1, 6)):
            damaged[chance.randrange(len(damaged))] = chance.choice(string.printable.encode() + b"\xff\x00\xc3")
        assert send(app, "POST", path, bytes(damaged)).status in (200, 400, 404)
