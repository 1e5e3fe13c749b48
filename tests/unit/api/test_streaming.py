"""Streams: equal to the complete response, sent as complete characters, stopped when the client disconnects."""

import asyncio
import json

import pytest
from asgi import data_lines, run, send, send_async

from entrypoints.api import streaming

CHAT = "/v1/chat/completions"
TOOLS = [{"type": "function", "function": {"name": "get_weather"}}, {"type": "function", "function": {"name": "clock"}}]
CALL = "get_weather\n```python\ntool_call(city='北京', days=2)\n```"


def chat_body(text, **fields):
    return {"messages": [{"role": "user", "content": text}], **fields}


def complete(app, text, **fields):
    return send(app, "POST", CHAT, chat_body(text, **fields)).json()


def streamed(app, text, **fields):
    """The streamed choices, joined: {"content", "tool_calls", "finish_reason", "logprobs"} by index."""
    reply = send(app, "POST", CHAT, chat_body(text, stream=True, **fields))
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in reply.headers
    found = {}
    for event in reply.events():
        assert event["object"] == "chat.completion.chunk"
        for choice in event["choices"]:
            answer = found.setdefault(choice["index"], {"content": "", "tool_calls": [], "logprobs": []})
            assert "finish_reason" not in answer, "nothing follows the finish_reason"
            answer["content"] += choice["delta"].get("content") or ""
            answer["tool_calls"] += choice["delta"].get("tool_calls") or []
            answer["logprobs"] += (choice["logprobs"] or {"content": []})["content"]
            if choice["finish_reason"]:
                answer["finish_reason"] = choice["finish_reason"]
    return found


SCRIPTS = [
    "say 好", "say 你好！", "say a <", "say 用 get_data() 取值", "say get_weather", "say 👋🏽 𠮷 café", "say <|user|>",
    "say 一\u2028二\u0085三\x0b四", "raw clock", "raw clock\n", f"raw {CALL}", "raw get_weather\n不调用", "count 12",
    "say ```python\ntool_call(a=1)\n```", "say", "raw clock\n```python\ntool_call(a=__import__('os').getcwd())\n```",
    "raw get_weather\n```python\ntool_call(", "raw \n\n\n", "say \ufffd�", 'say {"a": "\\n"}',
]  # fmt: skip


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_stream_equals_the_complete_response_at_every_length(app, script, tools):
    for max_tokens in [*range(1, 13), 200]:
        fields = {"max_tokens": max_tokens, "logprobs": True, **({"tools": tools} if tools else {})}
        choice = complete(app, script, **fields)["choices"][0]
        answer = streamed(app, script, **fields)[0]
        assert answer["content"] == (choice["message"]["content"] or "")
        assert answer["finish_reason"] == choice["finish_reason"]
        assert answer["logprobs"] == choice["logprobs"]["content"]
        called = [call["function"] for call in choice["message"].get("tool_calls", [])]
        assert [call["function"] for call in answer["tool_calls"]] == called


@pytest.mark.parametrize("text", ["你好", "a <", "用 get_data() 取值", "👋🏽 𠮷", "<|user|>", "get_weather 北京", "�"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
def test_the_content_is_the_text_of_the_model(app, text, tools):
    assert complete(app, f"say {text}", tools=tools)["choices"][0]["message"]["content"] == text


def test_a_character_of_several_ids_is_sent_with_its_last_one(app, engine):
    """👋 is four byte tokens; a stream must not send parts of it, only the character or one U+FFFD at the end."""
    ids = [engine.tokenizer.byte_token_id(byte) for byte in "👋".encode()]
    for max_tokens, text in ((1, "�"), (2, "�"), (3, "�"), (4, "👋")):
        assert complete(app, f"ids {ids}", max_tokens=max_tokens)["choices"][0]["message"]["content"] == text
        assert streamed(app, f"ids {ids}", max_tokens=max_tokens)[0]["content"] == text
    events = send(app, "POST", CHAT, chat_body(f"ids {ids}", stream=True)).events()
    contents = [choice["delta"]["content"] for e in events for choice in e["choices"] if choice["delta"].get("content")]
    assert contents == ["👋"]


def test_a_tool_call_has_openais_format(app):
    choice = complete(app, f"raw {CALL}", tools=TOOLS)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    (called,) = choice["message"]["tool_calls"]
    assert called["id"].startswith("call_")
    assert (called["type"], called["function"]["name"]) == ("function", "get_weather")
    assert json.loads(called["function"]["arguments"]) == {"city": "北京", "days": 2}
    (delta,) = streamed(app, f"raw {CALL}", tools=TOOLS)[0]["tool_calls"]
    assert delta["index"] == 0


def test_a_call_is_text_if_the_request_has_no_tools(app):
    """The same with tool_choice none."""
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = complete(app, f"raw {CALL}", **fields)["choices"][0]
        assert choice["message"]["content"].replace("\n ", "\n", 1) == CALL, "the blank is the body's dummy prefix"
        assert choice["finish_reason"] == "stop"


def test_model_output_is_never_executed(app, tmp_path):
    target = tmp_path / "pwn"
    for code in (
        f"a=__import__('os').system('touch {target}')",
        f"a=open('{target}', 'w')",
        f"**{{'a': open('{target}')}}",
    ):
        script = f"raw get_weather\n```python\ntool_call({code})\n```"
        choice = complete(app, script, tools=TOOLS)["choices"][0]
        assert not target.exists()
        assert choice["finish_reason"] == "stop"
        assert "tool_call" in choice["message"]["content"]


@pytest.mark.parametrize("stop", ["c", "bc", ["x", "cd"], "bcd", "d"])
def test_a_stop_string_cuts_stream_and_complete_response_alike(app, stop):
    ids = "say abcdef"
    choice = complete(app, ids, stop=stop)["choices"][0]
    expected = "abcdef".partition({"c": "c", "bc": "bc", "bcd": "bcd", "d": "d"}.get(str(stop), "cd"))[0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")
    answer = streamed(app, ids, stop=stop)[0]
    assert (answer["content"], answer["finish_reason"]) == (expected, "stop")


def test_a_stop_string_frees_the_slot_at_once(app, engine):
    complete(app, "count 1000 0.001", stop="3")
    assert engine.running == 0


def test_usage_is_the_last_event_and_only_on_request(app):
    with_usage = send(
        app, "POST", CHAT, chat_body("count 5", stream=True, stream_options={"include_usage": True})
    ).events()
    assert with_usage[-1]["choices"] == []
    assert with_usage[-1]["usage"] == complete(app, "count 5")["usage"]
    assert {event["usage"] for event in with_usage[:-1]} == {None}
    without = send(app, "POST", CHAT, chat_body("count 5", stream=True)).events()
    assert not any("usage" in event for event in without)


def test_a_streamed_text_completion_equals_the_complete_response(app):
    for max_tokens in (1, 2, 7, 50):
        body = {"prompt": ["count 9", "count 3"], "max_tokens": max_tokens, "logprobs": 1, "n": 2}
        answers = send(app, "POST", "/v1/completions", body).json()
        events = send(
            app, "POST", "/v1/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}
        ).events()
        for choice in answers["choices"]:
            parts = [part for event in events for part in event["choices"] if part["index"] == choice["index"]]
            assert "".join(part["text"] for part in parts) == choice["text"]
            assert [token for part in parts for token in part["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]
            assert [part["finish_reason"] for part in parts][-1] == choice["finish_reason"]
            assert not any(part["finish_reason"] for part in parts[:-1])
        assert events[-1]["usage"] == answers["usage"]


def test_every_event_is_one_line_for_any_line_splitter(app):
    """Some clients also split lines at U+2028 and U+0085."""
    reply = send(app, "POST", CHAT, chat_body("say 一\u2028二\u0085三\u2029四", stream=True))
    lines = [line for line in reply.body.decode().splitlines() if line]
    assert all(line == "data: [DONE]" or json.loads(line.removeprefix("data: ")) for line in lines)
    assert len(reply.events()) >= 7


def test_a_thousand_tokens_are_valid_events(app):
    events = send(app, "POST", CHAT, chat_body("count 1000", stream=True, max_tokens=1000)).events()
    assert "".join(c["delta"].get("content", "") for e in events for c in e["choices"]) == "0123456789" * 100


def test_a_failure_while_streaming_is_the_last_event(app, engine):
    reply = send(app, "POST", CHAT, chat_body("fail 10", stream=True))
    *deltas, last = (json.loads(line) for line in data_lines(reply.body))
    assert "".join(c["delta"].get("content", "") for e in deltas for c in e["choices"]) == "0123456789"
    assert last["error"] == {
        "message": "the engine failed",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }
    assert reply.finished
    assert engine.running == 0


def test_a_failed_choice_stops_the_other_choices_of_the_request(app, engine):
    assert send(app, "POST", "/v1/completions", {"prompt": ["fail 2", "count 100 0.01"]}).status == 500
    assert engine.running == 0
    assert app.state.server.admission.running == app.state.server.admission.waiting == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", ["count 1000 0.2", "count 1 200"], ids=["between tokens", "before the first token"])
def test_a_disconnect_frees_the_slot(make_app, stream, script):
    """Streamed and not, between tokens and before the first one."""
    app = make_app(slots=1)
    state = app.state.server

    async def scenario():
        disconnected = await send_async(
            app, "POST", CHAT, chat_body(script, stream=stream), disconnect_when=lambda reply: state.engine.running
        )
        return disconnected, await asyncio.wait_for(send_async(app, "POST", CHAT, chat_body("say x")), 60)

    disconnected, answer = run(scenario())
    assert disconnected.status == (200 if stream else 499)
    assert not disconnected.body.endswith(b"[DONE]\n\n")
    assert (answer.status, state.engine.running, state.admission.running) == (200, 0, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_in_the_queue_takes_no_slot(make_app, stream):
    app = make_app(slots=1)
    state = app.state.server

    async def scenario():
        first = asyncio.create_task(send_async(app, "POST", CHAT, chat_body("count 30 0.05")))
        while not state.engine.running:
            await asyncio.sleep(0.001)
        await send_async(
            app,
            "POST",
            CHAT,
            chat_body("count 9", stream=stream),
            disconnect_when=lambda reply: state.admission.waiting,
        )
        assert state.admission.waiting == 0
        return await first

    assert run(scenario()).status == 200
    assert len(state.engine.prompts) == 1


def test_a_hundred_disconnects_leak_no_slot(make_app):
    app = make_app(slots=3, queue=200)
    state = app.state.server

    async def scenario():
        async def one(number):
            body = chat_body(f"count 20 0.00{number % 4}", stream=number % 2 == 0, n=1 + number % 3)
            disconnect = (lambda reply: len(reply.chunks) > number % 7) if number % 3 == 0 else None
            if disconnect and number % 2:
                disconnect = lambda reply: state.engine.running > 1  # noqa: E731
            return await send_async(app, "POST", CHAT, body, disconnect_when=disconnect)

        return await asyncio.gather(*(one(number) for number in range(100)))

    replies = run(scenario())
    assert {reply.status for reply in replies} <= {200, 499}
    assert sum(reply.status == 200 and reply.finished for reply in replies) >= 66
    assert (state.engine.running, state.admission.running, state.admission.waiting) == (0, 0, 0)
    assert send(app, "POST", CHAT, chat_body("say x", n=3)).status == 200


def ids_of(engine, *texts):
    """A script whose segments are separated as the model does it."""
    parts = [[*engine.tokenizer.encode(head), *engine.tokenizer.encode(body)] for head, body in texts]
    separator = engine.tokenizer.special_token_id("<|assistant|>")
    return f"ids {json.dumps([id_ for part in parts for id_ in (separator, *part)][1:])}"


TWO_CALLS = (("get_weather\n", "```python\ntool_call(city='北京')\n```"), ("clock\n", "```python\ntool_call()\n```"))


def test_each_event_has_at_most_one_call(app, engine):
    reply = send(app, "POST", CHAT, chat_body(ids_of(engine, *TWO_CALLS), stream=True, tools=TOOLS))
    calls = [event["choices"][0]["delta"].get("tool_calls") or [] for event in reply.events()]
    assert [[(call["index"], call["function"]["name"]) for call in event] for event in calls if event] == [
        [(0, "get_weather")], [(1, "clock")]
    ]  # fmt: skip


@pytest.mark.parametrize("max_tokens", [None, 200])
def test_without_parallel_calls_the_answer_ends_after_the_first(app, engine, max_tokens):
    script = ids_of(engine, *TWO_CALLS, ("\n", "再见"))
    for parallel, names in (
        (False, ["get_weather"]),
        (True, ["get_weather", "clock"]),
        (None, ["get_weather", "clock"]),
    ):
        fields = {"parallel_tool_calls": parallel, "tools": TOOLS, "max_tokens": max_tokens}
        choice = complete(app, script, **fields)["choices"][0]
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == names
        assert choice["finish_reason"] == "tool_calls"
        assert [call["function"]["name"] for call in streamed(app, script, **fields)[0]["tool_calls"]] == names
        assert choice["message"]["content"] == (None if parallel is False else "再见")


def test_an_answer_that_is_cut_inside_a_call_has_no_markup_in_its_content(app, engine):
    script = ids_of(engine, TWO_CALLS[0])
    whole = complete(app, script, tools=TOOLS)
    lengths = range(1, whole["usage"]["completion_tokens"])
    assert len(lengths) > 5
    for max_tokens in lengths:
        choice = complete(app, script, tools=TOOLS, max_tokens=max_tokens)["choices"][0]
        if choice["finish_reason"] == "tool_calls":  # the call is complete, its end mark is missing
            assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "北京"}'
        else:
            assert (choice["finish_reason"], choice["message"]) == ("length", {"role": "assistant", "content": ""})
    assert (
        complete(app, "say clockwork", tools=TOOLS, max_tokens=200)["choices"][0]["message"]["content"] == "clockwork"
    )


@pytest.mark.parametrize(("script", "slots"), [("count 2 0.3", 2), ("count 1", 1)], ids=["prefill", "queue"])
def test_a_silent_stream_sends_comments(make_app, script, slots, monkeypatch):
    """Proxies close a connection without data after 60 s."""
    monkeypatch.setattr(streaming, "HEARTBEAT_SECONDS", 0.05)
    app = make_app(slots=slots)

    async def both():
        first = asyncio.create_task(send_async(app, "POST", CHAT, chat_body("count 1 0.5")))
        while not app.state.server.require_engine().running:
            await asyncio.sleep(0.01)
        reply = await send_async(app, "POST", CHAT, chat_body(script, stream=True, tools=TOOLS))
        await first
        return reply

    reply = run(both())
    assert reply.chunks.count(streaming.HEARTBEAT) >= 3
    assert data_lines(reply.body.replace(streaming.HEARTBEAT, b""))[-1] == "[DONE]"
    assert streaming.HEARTBEAT.startswith(b":"), "a comment"


def test_a_busy_stream_sends_no_comments(app, monkeypatch):
    monkeypatch.setattr(streaming, "HEARTBEAT_SECONDS", 5)
    assert send(app, "POST", CHAT, chat_body("count 100", stream=True)).events()
