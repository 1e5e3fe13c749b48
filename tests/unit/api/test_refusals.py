"""What a caller is told who sends something wrong: 400 in OpenAI's shape, and the field by name."""

import pytest
from asgi import ask

CHAT = "/v1/chat/completions"
HELLO = {"role": "user", "content": "say x"}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [HELLO], "temperature": 3}, "temperature"),
        ({"messages": [HELLO], "colour": 1}, "colour"),
        ({"messages": [HELLO], "stop": ["", "x"]}, "stop.0"),
        ({"messages": [HELLO], "stop": {"a": 1}}, "stop"),
        ({"messages": [HELLO, {"role": "user"}]}, "messages.1"),
        ({"messages": [HELLO, {"content": "x"}]}, "messages.1.role"),
        ({"messages": [HELLO, {"role": "user", "content": 5}]}, "messages.1.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [["你好", "您好"]]}, "messages.0"),
        ({"messages": {"role": "user"}}, "messages"),
        ({"messages": [HELLO], "tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"messages": [HELLO], "tools": [{"type": "code_interpreter"}]}, "tools.0.type"),
        ({"messages": [HELLO], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"messages": [HELLO], "tools": [TOOL, TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"messages": [HELLO], "tools": [TOOL], "tool_choice": {"function": {"name": "g"}}}, "tool_choice"),
        ({"messages": [HELLO], "tool_choice": "required"}, "tool_choice"),
        ({"messages": [HELLO], "response_format": {"type": "json_schema"}}, "response_format"),
        ({"messages": [HELLO], "stream_options": {"include_usage": "perhaps"}}, "stream_options.include_usage"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [HELLO, {"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [HELLO], "tools": [TOOL] * 129}, "tools"),
    ],
)  # fmt: skip
def test_the_field_at_fault_is_named(app, engine, body, param):
    reply = ask(app, "POST", CHAT, body)
    error = reply.error()
    assert (reply.status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert param in error["message"] or error["code"] == "invalid_messages"
    assert not engine.prompts


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"messages": ' + b"[" * 100_000,
        b"9" * 5000,
        b'{"n": 1e999}',
        b"{}{}",
    ],
)
def test_a_body_that_is_no_object_of_ours_is_refused(app, content):
    reply = ask(app, "POST", CHAT, content)
    assert (reply.status, reply.error()["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/xml"])
def test_a_body_of_another_type_is_refused(app, kind):
    reply = ask(app, "POST", CHAT, {"messages": [HELLO]}, headers={"content-type": kind})
    assert reply.status == 400
    assert reply.error()


def test_arguments_of_an_earlier_call_that_are_no_json_are_named(app):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{'a': 1}"}}
    turns = [HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "1"}]
    reply = ask(app, "POST", CHAT, {"messages": turns})
    assert (reply.status, reply.error()["code"]) == (400, "invalid_messages")
    assert "messages.1.tool_calls.0.function.arguments is no JSON" in reply.error()["message"]


@pytest.mark.parametrize("depth", [33, 400, 900])
def test_tools_and_schemas_of_great_depth_are_refused(app, depth):
    """Shown to the model indented, 900 levels would be megabytes of blanks."""
    nested = b'{"a":' * depth + b"1" + b"}" * depth
    tools = b'"tools": [{"type": "function", "function": {"name": "f", "parameters": ' + nested + b"}}]"
    schema = b'"response_format": {"type": "json_schema", "json_schema": {"name": "f", "schema": ' + nested + b"}}"
    for field in (tools, schema):
        reply = ask(app, "POST", CHAT, b'{"messages": [{"role": "user", "content": "x"}], ' + field + b"}")
        assert (reply.status, "nested deeper than 32" in reply.error()["message"]) == (400, True)


def test_tools_of_great_length_are_refused(app):
    wide = {"type": "function", "function": {"name": "f", "parameters": {"a": "x" * 100_000}}}
    assert ask(app, "POST", CHAT, {"messages": [HELLO], "tools": [wide]}).error()["param"].startswith("tools.0")
    many = [{"type": "function", "function": {"name": "f", "description": "x" * 1000}}] * 110
    assert ask(app, "POST", CHAT, {"messages": [HELLO], "tools": many}).error()["param"] == "tools"


def test_a_caller_is_never_shown_what_others_asked_or_what_broke(app):
    reply = ask(app, "POST", CHAT, {"messages": [{"role": "user", "content": "fail 3"}]})
    assert reply.status == 500
    assert reply.error() == {
        "message": "the engine failed", "type": "server_error", "param": None, "code": "engine_error"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("script", "status", "code"), [("refuse", 400, "invalid_request"), ("broken", 500, "engine_error")]
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_an_engine_refuses_is_the_callers_mistake_and_a_broken_model_is_not(app, script, status, code, stream):
    reply = ask(app, "POST", CHAT, {"messages": [{"role": "user", "content": script}], "stream": stream})
    if stream:
        assert reply.status == 200
        assert f'"code": "{code}"'.encode() in reply.body
        assert not reply.body.endswith(b"[DONE]\n\n")
    else:
        assert (reply.status, reply.error()["code"]) == (status, code)
    assert ask(app, "POST", CHAT, {"messages": [HELLO]}).status == 200
