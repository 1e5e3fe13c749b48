"""/v1/responses: the same prompts and answers as chat completions, in the shape of OpenAI's Responses API.

Responses and events are validated with the types of OpenAI's client, which check every field.
"""

import json

import pytest
from asgi import send
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from entrypoints.api.auth import KeyRing

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
FUNCTION = {
    "type": "function",
    "name": "get_weather",
    "description": "查询天气",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}
CLOCK = {"type": "function", "name": "clock", "parameters": None, "strict": None}
CALL = "get_weather\n```python\ntool_call(city='北京', days=2)\n```"
EVENT = TypeAdapter(ResponseStreamEvent)
VARYING = {"id", "call_id", "created_at", "completed_at"}


def respond(app, script, **fields):
    reply = send(app, "POST", RESPONSES, {"input": script, **fields})
    assert reply.status == 200, reply.body
    Response.model_validate(reply.json())
    return reply.json()


def events_of(reply):
    """Data of all events; asserts that each is named, numbered and of a documented form."""
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = []
    for number, text in enumerate(reply.body.decode().removesuffix("\n\n").split("\n\n")):
        name, data = text.splitlines()
        event = json.loads(data.removeprefix("data: "))
        assert (name, event["sequence_number"]) == (f"event: {event['type']}", number)
        EVENT.validate_python(event)
        events.append(event)
    return events


def streamed(app, script, **fields):
    return events_of(send(app, "POST", RESPONSES, {"input": script, "stream": True, **fields}))


def without_ids(value):
    if isinstance(value, dict):
        return {key: without_ids(field) for key, field in value.items() if key not in VARYING}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


def prompt_of(app, engine, path, body):
    reply = send(app, "POST", path, body)
    assert reply.status == 200, reply.body
    return engine.prompts[-1]


def test_a_text_is_answered_with_one_message(app):
    response = respond(app, "say 你好", model="toy")
    (message,) = response["output"]
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "completed")
    assert message["content"] == [{"type": "output_text", "text": "你好", "annotations": [], "logprobs": []}]
    assert (response["object"], response["status"], response["model"]) == ("response", "completed", "toy")
    assert response["error"] is response["incomplete_details"] is response["previous_response_id"] is None
    usage = response["usage"]
    chat = send(app, "POST", CHAT, {"messages": [{"role": "user", "content": "say 你好"}]}).json()["usage"]
    assert [usage[name] for name in ("input_tokens", "output_tokens", "total_tokens")] == [*chat.values()]


def test_an_empty_answer_is_an_empty_message(app):
    assert Response.model_validate(respond(app, "say")).output_text == ""
    assert len(respond(app, "say")["output"]) == 1


def test_the_events_of_a_text_have_openais_order(app):
    events = streamed(app, "say 你好")
    names = [event["type"].removeprefix("response.") for event in events]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(names[4:-4]) == {"output_text.delta"}
    assert names[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert "".join(event["delta"] for event in events if "delta" in event) == events[-4]["text"] == "你好"
    assert len({event["item_id"] for event in events if "item_id" in event} | {events[2]["item"]["id"]}) == 1
    assert events[0]["response"]["usage"] is None
    assert not events[1]["response"]["output"]


def test_the_events_of_calls_have_openais_order(app):
    events = streamed(app, f"raw {CALL}", tools=[FUNCTION, CLOCK])
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done", "completed",
    ]  # fmt: skip
    added, delta, done, item = events[2:6]
    assert (added["item"]["arguments"], added["item"]["status"]) == ("", "in_progress")
    assert json.loads(delta["delta"]) == json.loads(done["arguments"]) == {"city": "北京", "days": 2}
    assert item["item"] == {**added["item"], "arguments": done["arguments"], "status": "completed"}
    assert events[-1]["response"]["output"] == [item["item"]]


SCRIPTS = ["say 你好！", "say", "say 👋🏽 𠮷", f"raw {CALL}", "raw clock\n", "count 12", "raw get_weather\n不调用"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_stream_ends_with_the_complete_response_at_every_length(app, script):
    for max_output_tokens in (1, 2, 3, 5, 8, 13, 200):
        fields = {"max_output_tokens": max_output_tokens, "tools": [FUNCTION, CLOCK], "top_logprobs": 2}
        *events, last = streamed(app, script, **fields)
        complete = respond(app, script, **fields)
        assert without_ids(last["response"]) == without_ids(complete)
        texts = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
        assert "".join(texts) == Response.model_validate(complete).output_text
        logprobs = [entry for event in events if "delta" in event for entry in event.get("logprobs", ())]
        parts = [part for item in complete["output"] for part in item.get("content", ())]
        assert logprobs == [entry for part in parts for entry in part["logprobs"]]


def test_an_answer_cut_at_max_output_tokens_is_incomplete(app):
    response = respond(app, "count 9", max_output_tokens=4)
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert response["output"][0]["status"] == "incomplete"
    assert response["usage"]["output_tokens"] == 4
    assert streamed(app, "count 9", max_output_tokens=4)[-1]["type"] == "response.incomplete"


def test_items_are_the_same_prompt_as_messages(app, engine):
    """Instructions, roles, text parts, parallel calls and their outputs."""

    def call(id_, city):
        return {
            "id": id_,
            "type": "function",
            "function": {"name": "get_weather", "arguments": json.dumps({"city": city})},
        }

    messages = [
        {"role": "system", "content": "简短"},
        {"role": "developer", "content": "礼貌"},
        {"role": "user", "content": "天气"},
        {"role": "assistant", "content": "我查一下", "tool_calls": [call("c1", "北京"), call("c2", "上海")]},
        {"role": "tool", "tool_call_id": "c1", "content": "晴"},
        {"role": "tool", "tool_call_id": "c2", "content": "雨"},
        {"role": "assistant", "content": "北京晴，上海雨"},
        {"role": "user", "content": "say 好"},
    ]
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "礼"}, {"type": "input_text", "text": "貌"}]},
        {"type": "message", "role": "user", "content": "天气", "id": "msg_1", "status": "completed"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "我查一下"}]},
        {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "北京"}'},
        {"type": "function_call", "call_id": "c2", "name": "get_weather", "arguments": '{"city": "上海"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "晴"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "雨"}]},
        {"role": "assistant", "content": "北京晴，上海雨"},
        {"role": "user", "content": "say 好"},
    ]  # fmt: skip
    function = {key: value for key, value in FUNCTION.items() if key != "type"}
    chat = {"messages": messages, "tools": [{"type": "function", "function": function}]}
    body = {"instructions": "简短", "input": items, "tools": [FUNCTION]}
    assert prompt_of(app, engine, RESPONSES, body) == prompt_of(app, engine, CHAT, chat)


@pytest.mark.parametrize("script", ["say 好", f"raw {CALL}"])
def test_output_items_can_be_sent_back_as_they_are(app, engine, script):
    """Clients append `response.output` to the next input, OpenAI's client with parsed copies and nulls."""
    output = respond(app, script, tools=[FUNCTION])["output"]
    dumped = Response.model_validate({**respond(app, script, tools=[FUNCTION]), "output": output}).model_dump()[
        "output"
    ]
    for item in dumped:
        item["label_of_a_client"] = {"city": "北京"}
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "晴"}
        for item in output
        if item["type"] == "function_call"
    ]
    again = [{"role": "user", "content": "say 好"}]
    prompts = [
        prompt_of(app, engine, RESPONSES, {"input": [*again, *items, *results, *again], "tools": [FUNCTION]})
        for items in (output, dumped)
    ]
    assert prompts[0] == prompts[1]
    assert len(prompts[0]) > len(prompt_of(app, engine, RESPONSES, {"input": again, "tools": [FUNCTION]}))


@pytest.mark.parametrize(
    ("choice", "offered", "called"),
    [
        ("auto", ["get_weather", "clock"], False),
        ("none", [], False),
        ({"type": "function", "name": "clock"}, ["get_weather", "clock"], True),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "clock"}]}, ["clock"], False),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]},
            ["clock"],
            True,
        ),
    ],
)
def test_tool_choice_offers_and_requires_tools(app, engine, choice, offered, called):
    response = respond(app, "say 好", tools=[FUNCTION, CLOCK], tool_choice=choice)
    assert response["tool_choice"] == choice
    prompt = b"".join(map(engine.tokenizer.token_bytes, engine.prompts[-1])).decode()
    assert [name for name in ("get_weather", "clock") if f'"name": "{name}"' in prompt] == offered
    assert (engine.samplings[-1].grammar is not None) == called


def test_parameters_reach_the_engine_and_are_returned(app, engine):
    fields = {"temperature": 0.3, "top_p": 0.4, "max_output_tokens": 7, "top_logprobs": 2}
    response = respond(app, "say 好", **fields)
    sampling = engine.samplings[-1]
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens, sampling.top_logprobs) == (0.3, 0.4, 7, 2)
    assert {name: response[name] for name in fields} == fields
    assert len(response["output"][0]["content"][0]["logprobs"][0]["top_logprobs"]) == 2
    assert respond(app, "say 好", include=["message.output_text.logprobs"])["output"][0]["content"][0]["logprobs"]


def test_a_top_p_of_zero_is_greedy_and_the_parameters_that_took_effect_are_returned(app, engine):
    response = respond(app, "say 好", temperature=1, top_p=0)
    assert engine.samplings[-1].greedy
    assert (response["temperature"], response["top_p"]) == (0, 1)


def test_a_text_format_reaches_the_engine_or_is_rejected_by_name(app, engine):
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    format_ = {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}
    error = send(app, "POST", RESPONSES, {"input": "say 好", "text": {"format": format_}}).error()
    assert (error["param"], error["code"]) == ("text.format", "unsupported_parameter")
    assert "text.format" in error["message"]
    engine.features = engine.features | {"json_schema"}
    assert respond(app, "say 好", text={"format": format_})["text"]["format"] == format_
    assert engine.samplings[-1].json_schema == schema
    respond(app, "say 好", text={"format": {"type": "json_object"}})
    assert engine.samplings[-1].json_schema == {}
    respond(app, "say 好", text={"format": {"type": "text"}, "verbosity": "medium"})
    assert engine.samplings[-1].json_schema is None


NEUTRAL = {
    "store": True, "include": ["reasoning.encrypted_content"], "truncation": "auto", "max_tool_calls": 3,
    "metadata": {"a": "b"}, "user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "service_tier": "auto",
    "prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "implicit", "ttl": "30m"},
    "previous_response_id": None, "conversation": None, "background": False, "prompt": None, "moderation": None,
    "reasoning": {"effort": None, "summary": "auto"}, "context_management": [], "parallel_tool_calls": True,
    "stream_options": {"include_obfuscation": False}, "tools": [], "tool_choice": "auto",
}  # fmt: skip


def test_fields_that_change_nothing_are_accepted_and_returned(app, engine):
    plain = prompt_of(app, engine, RESPONSES, {"input": "say 好"})
    response = respond(app, "say 好", **NEUTRAL)
    assert engine.prompts[-1] == plain
    assert engine.samplings[-1] == engine.samplings[-2]
    echoed = ("metadata", "user", "safety_identifier", "prompt_cache_key", "max_tool_calls")
    assert {name: response[name] for name in echoed} == {name: NEUTRAL[name] for name in echoed}
    assert response["store"] is False, "nothing is stored, whatever a client asks for"


MESSAGE = {"role": "user", "content": "say 好"}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation in input"),
        ({"conversation": {"id": "conv_1"}}, "conversation", "send the whole conversation in input"),
        ({"background": True}, "background", "while the client waits"),
        ({"prompt": {"id": "p"}}, "prompt", "send instructions and input"),
        ({"context_management": [{"type": "compaction"}]}, "context_management", "does not shorten"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "does not reason"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "medium"),
        ({"tools": [{"type": "web_search"}]}, "tools.0", "'web_search'"),
        ({"tools": [FUNCTION, {"type": "mcp", "server_label": "x"}]}, "tools.1", "'mcp'"),
        ({"tools": [{**FUNCTION, "defer_loading": True}]}, "tools.0.defer_loading", "not permitted"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "'web_search'"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}},
         "tool_choice", "'f'"),
        ({"input": [MESSAGE, {"type": "item_reference", "id": "msg_1"}]}, "input.1", "set store to false"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input.0.content.0", "'input_image'"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input.0", "'reasoning'"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "[1]"}]},
         "input.0.arguments", "not a JSON object"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0", "call_id"),
        ({"input": [MESSAGE, {"type": "function_call_output", "call_id": "c", "output": "x"}]},
         "input.1.call_id", "names no function_call"),
        ({"input": [{"role": "user"}]}, "input.0", "content"),
        ({"input": [{**MESSAGE, "color": 1}]}, "input.0.color", "not permitted"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "\ud800"}]}]},
         "input.0.content.0.text", "half a character"),
        ({"input": []}, "input", "at least 1"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater"),
        ({"seed": 1}, "seed", "not permitted"),
        ({"model": "gpt-5"}, "model", "not found"),
        ({"input": "裙" * 3000}, "input", "the context length is 2048"),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_is_rejected_by_name(app, engine, fields, param, words):
    reply = send(app, "POST", RESPONSES, {"input": "say 好", **fields})
    assert reply.status == (404 if "model" in fields else 400)
    assert reply.error()["param"] == param
    assert words in reply.error()["message"]
    assert not engine.prompts


@pytest.mark.parametrize(("script", "code"), [("fail 2", "server_error"), ("refuse", "invalid_prompt")])
def test_a_failure_while_streaming_is_the_last_event(app, engine, script, code):
    *_, last = streamed(app, script)
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == code
    assert engine.running == 0


def test_responses_are_admitted_counted_and_authenticated_like_chat(make_app):
    app = make_app(keys=KeyRing(single="secret"))
    assert send(app, "POST", RESPONSES, {"input": "say 好"}).status == 401
    reply = send(app, "POST", RESPONSES, {"input": "say 好"}, headers={"authorization": "Bearer secret"})
    assert reply.status == 200
    metrics = send(app, "GET", "/metrics").body.decode()
    assert 'glm_requests_total{path="/v1/responses",status="200"} 1.0' in metrics
    usage = reply.json()["usage"]
    assert f'glm_prompt_tokens_total{{model="toy"}} {usage["input_tokens"]}.0' in metrics
    app.state.server.admission.draining = True
    assert send(app, "POST", RESPONSES, {"input": "x"}, headers={"authorization": "Bearer secret"}).status == 503
