"""Traps D2, D3, D4, D7 and D8 of the list of reported pains, and that a stream says what the whole says."""

import asyncio
import json

import pytest
from asgi import ask, call, data_lines, run

CHAT = "/v1/chat/completions"
TOOLS = [{"type": "function", "function": {"name": "get_weather"}}, {"type": "function", "function": {"name": "clock"}}]
CALL = "get_weather\n```python\ntool_call(city='北京', days=2)\n```"


def question(text, **fields):
    return {"messages": [{"role": "user", "content": text}], **fields}


def whole(app, text, **fields):
    return ask(app, "POST", CHAT, question(text, **fields)).json()


def streamed(app, text, **fields):
    """The streamed answers put together again: {"content", "tool_calls", "finish_reason", "logprobs"} by index."""
    reply = ask(app, "POST", CHAT, question(text, stream=True, **fields))
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in reply.headers
    found = {}
    for event in reply.events():
        assert event["object"] == "chat.completion.chunk"
        for choice in event["choices"]:
            answer = found.setdefault(choice["index"], {"content": "", "tool_calls": [], "logprobs": []})
            assert "finish_reason" not in answer, "nothing comes after the finish"
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
def test_a_stream_says_what_the_whole_says_at_every_length(app, script, tools):
    for most in [*range(1, 13), 200]:
        fields = {"max_tokens": most, "logprobs": True, **({"tools": tools} if tools else {})}
        choice = whole(app, script, **fields)["choices"][0]
        answer = streamed(app, script, **fields)[0]
        assert answer["content"] == (choice["message"]["content"] or "")
        assert answer["finish_reason"] == choice["finish_reason"]
        assert answer["logprobs"] == choice["logprobs"]["content"]
        called = [call["function"] for call in choice["message"].get("tool_calls", [])]
        assert [call["function"] for call in answer["tool_calls"]] == called


@pytest.mark.parametrize("text", ["你好", "a <", "用 get_data() 取值", "👋🏽 𠮷", "<|user|>", "get_weather 北京", "�"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
def test_the_text_is_what_the_model_wrote(app, text, tools):
    assert whole(app, f"say {text}", tools=tools)["choices"][0]["message"]["content"] == text


def test_a_character_of_several_ids_comes_with_its_last_one(app, engine):
    """D2: 👋 is F0 9F 91 8B, a byte piece each, and ends whole or as one replacement character."""
    ids = [engine.tokenizer.byte(byte) for byte in "👋".encode()]
    for most, text in ((1, "�"), (2, "�"), (3, "�"), (4, "👋")):
        assert whole(app, f"ids {ids}", max_tokens=most)["choices"][0]["message"]["content"] == text
        assert streamed(app, f"ids {ids}", max_tokens=most)[0]["content"] == text
    events = ask(app, "POST", CHAT, question(f"ids {ids}", stream=True)).events()
    contents = [choice["delta"]["content"] for e in events for choice in e["choices"] if choice["delta"].get("content")]
    assert contents == ["👋"]


def test_a_tool_call_is_told_in_openais_shape_and_way(app):
    choice = whole(app, f"raw {CALL}", tools=TOOLS)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    (called,) = choice["message"]["tool_calls"]
    assert called["id"].startswith("call_")
    assert (called["type"], called["function"]["name"]) == ("function", "get_weather")
    assert json.loads(called["function"]["arguments"]) == {"city": "北京", "days": 2}
    (delta,) = streamed(app, f"raw {CALL}", tools=TOOLS)[0]["tool_calls"]
    assert delta["index"] == 0


def test_a_call_is_text_where_no_tools_were_offered(app):
    """D3: and with tool_choice none, which offers none."""
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = whole(app, f"raw {CALL}", **fields)["choices"][0]
        assert choice["message"]["content"].replace("\n ", "\n", 1) == CALL, "the blank is the body's dummy prefix"
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_forced_call_is_begun_for_the_model(app, engine, choice):
    tools = TOOLS[:1] if choice == "required" else TOOLS
    body = tokens_of(engine, "city='北京')\n```")
    answer = whole(app, f"ids {body}", tools=tools, tool_choice=choice)
    (called,) = answer["choices"][0]["message"]["tool_calls"]
    assert called["function"] == {"name": "get_weather", "arguments": '{"city": "北京"}'}
    assert answer["usage"]["completion_tokens"] == len(body), "what was begun for it, it did not write"
    plain = whole(app, f"ids {body}", tools=tools)["usage"]["prompt_tokens"]
    assert answer["usage"]["prompt_tokens"] == plain
    assert len(engine.prompts[0]) > plain


def tokens_of(engine, text):
    """Ids of a text that goes on after another: without the dummy prefix."""
    return [engine.tokenizer.byte(byte) for byte in text.encode()]


def test_model_text_is_never_run(app, tmp_path):
    """L1."""
    target = tmp_path / "pwn"
    for code in (
        f"a=__import__('os').system('touch {target}')",
        f"a=open('{target}', 'w')",
        f"**{{'a': open('{target}')}}",
    ):
        script = f"raw get_weather\n```python\ntool_call({code})\n```"
        choice = whole(app, script, tools=TOOLS)["choices"][0]
        assert not target.exists()
        assert choice["finish_reason"] == "stop"
        assert "tool_call" in choice["message"]["content"]


@pytest.mark.parametrize("stop", ["c", "bc", ["x", "cd"], "bcd", "d"])
def test_a_stop_string_ends_both_ways_alike(app, stop):
    ids = "say abcdef"
    choice = whole(app, ids, stop=stop)["choices"][0]
    expected = "abcdef".partition({"c": "c", "bc": "bc", "bcd": "bcd", "d": "d"}.get(str(stop), "cd"))[0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")
    answer = streamed(app, ids, stop=stop)[0]
    assert (answer["content"], answer["finish_reason"]) == (expected, "stop")


def test_a_stop_string_frees_the_slot_at_once(app, engine):
    whole(app, "count 1000 0.001", stop="3")
    assert engine.running == 0


def test_usage_comes_last_and_only_when_asked_for(app):
    with_usage = ask(
        app, "POST", CHAT, question("count 5", stream=True, stream_options={"include_usage": True})
    ).events()
    assert with_usage[-1]["choices"] == []
    assert with_usage[-1]["usage"] == whole(app, "count 5")["usage"]
    assert {event["usage"] for event in with_usage[:-1]} == {None}
    without = ask(app, "POST", CHAT, question("count 5", stream=True)).events()
    assert not any("usage" in event for event in without)


def test_a_streamed_completion_says_what_the_whole_says(app):
    for most in (1, 2, 7, 50):
        body = {"prompt": ["count 9", "count 3"], "max_tokens": most, "logprobs": 1, "n": 2}
        answers = ask(app, "POST", "/v1/completions", body).json()
        events = ask(
            app, "POST", "/v1/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}
        ).events()
        for choice in answers["choices"]:
            mine = [part for event in events for part in event["choices"] if part["index"] == choice["index"]]
            assert "".join(part["text"] for part in mine) == choice["text"]
            assert [token for part in mine for token in part["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]
            assert [part["finish_reason"] for part in mine][-1] == choice["finish_reason"]
            assert not any(part["finish_reason"] for part in mine[:-1])
        assert events[-1]["usage"] == answers["usage"]


def test_every_event_is_one_line_whoever_splits_it(app):
    """D8: some clients also break lines at U+2028 and U+0085."""
    reply = ask(app, "POST", CHAT, question("say 一\u2028二\u0085三\u2029四", stream=True))
    lines = [line for line in reply.body.decode().splitlines() if line]
    assert all(line == "data: [DONE]" or json.loads(line.removeprefix("data: ")) for line in lines)
    assert len(reply.events()) >= 7


def test_a_thousand_tokens_are_a_thousand_whole_events(app):
    events = ask(app, "POST", CHAT, question("count 1000", stream=True, max_tokens=1000)).events()
    assert "".join(c["delta"].get("content", "") for e in events for c in e["choices"]) == "0123456789" * 100


def test_a_failure_midway_is_an_event_and_the_end(app, engine):
    """D8: exception at token 10."""
    reply = ask(app, "POST", CHAT, question("fail 10", stream=True))
    *pieces, last = (json.loads(line) for line in data_lines(reply.body))
    assert "".join(c["delta"].get("content", "") for e in pieces for c in e["choices"]) == "0123456789"
    assert last["error"] == {
        "message": "the engine failed",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }
    assert reply.finished
    assert engine.running == 0


def test_a_failure_of_one_answer_ends_its_sisters(app, engine):
    assert ask(app, "POST", "/v1/completions", {"prompt": ["fail 2", "count 100 0.01"]}).status == 500
    assert engine.running == 0
    assert app.state.serving.admission.running == app.state.serving.admission.waiting == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", ["count 1000 0.2", "count 1 200"], ids=["while tokens come", "before the first"])
def test_the_slot_is_free_soon_after_the_caller_left(make_app, stream, script):
    """D7: with text flowing and without, streamed and not."""
    app = make_app(slots=1)
    serving = app.state.serving

    async def scene():
        gone = await call(
            app, "POST", CHAT, question(script, stream=stream), leave=lambda reply: serving.engine.running
        )
        return gone, await asyncio.wait_for(call(app, "POST", CHAT, question("say x")), 60)

    gone, answer = run(scene())
    assert gone.status == (200 if stream else 499)
    assert not gone.body.endswith(b"[DONE]\n\n")
    assert (answer.status, serving.engine.running, serving.admission.running) == (200, 0, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_who_leaves_the_queue_takes_no_slot(make_app, stream):
    app = make_app(slots=1)
    serving = app.state.serving

    async def scene():
        first = asyncio.create_task(call(app, "POST", CHAT, question("count 30 0.05")))
        while not serving.engine.running:
            await asyncio.sleep(0.001)
        await call(app, "POST", CHAT, question("count 9", stream=stream), leave=lambda reply: serving.admission.waiting)
        assert serving.admission.waiting == 0
        return await first

    assert run(scene()).status == 200
    assert len(serving.engine.prompts) == 1


def test_a_hundred_leavers_lose_no_slot(make_app):
    app = make_app(slots=3, queue=200)
    serving = app.state.serving

    async def scene():
        async def one(number):
            body = question(f"count 20 0.00{number % 4}", stream=number % 2 == 0, n=1 + number % 3)
            leave = (lambda reply: len(reply.chunks) > number % 7) if number % 3 == 0 else None
            if leave and number % 2:
                leave = lambda reply: serving.engine.running > 1  # noqa: E731
            return await call(app, "POST", CHAT, body, leave=leave)

        return await asyncio.gather(*(one(number) for number in range(100)))

    replies = run(scene())
    assert {reply.status for reply in replies} <= {200, 499}
    assert sum(reply.status == 200 and reply.finished for reply in replies) >= 66
    assert (serving.engine.running, serving.admission.running, serving.admission.waiting) == (0, 0, 0)
    assert ask(app, "POST", CHAT, question("say x", n=3)).status == 200
