"""Invalid requests: 400 in OpenAI's error format, with the field at fault."""

import pytest
from asgi import send

CHAT = "/v1/chat/completions"
HELLO = {"role": "user", "content": "say x"}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [HELLO], "temperature": 3}, "temperature"),
        ({"messages": [HELLO], "color": 1}, "color"),
        ({"messages": [HELLO], "stop": [5, "x"]}, "stop.0"),
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
        ({"messages": [HELLO], "tools": [], "tool_choice": "any"}, "tool_choice"),
        ({"messages": [HELLO], "tools": [TOOL], "tool_choice": {"function": {"name": "g"}}}, "tool_choice"),
        ({"messages": [HELLO], "tool_choice": "required"}, "tool_choice"),
        ({"messages": [HELLO], "response_format": {"type": "json_schema"}}, "response_format"),
        ({"messages": [HELLO], "stream_options": {"include_usage": "perhaps"}}, "stream_options.include_usage"),
        ({"messages": [HELLO], "tools": [TOOL] * 129}, "tools"),
    ],
)  # fmt: skip
def test_the_error_names_the_field_at_fault(app, engine, body, param):
    reply = send(app, "POST", CHAT, body)
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
def test_a_body_that_is_not_a_valid_object_is_rejected(app, content):
    reply = send(app, "POST", CHAT, content)
    assert (reply.status, reply.error()["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/xml"])
def test_a_content_type_other_than_json_is_rejected(app, kind):
    reply = send(app, "POST", CHAT, {"messages": [HELLO]}, headers={"content-type": kind})
    assert reply.status == 400
    assert reply.error()["message"].startswith(
        f"body: the Content-Type is {repr(kind) if kind else 'missing'}; it must"
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            '{"messages": "你好"}'.encode("gbk"),
            "the body is not UTF-8 (byte 14), it seems to be GBK; encode it as UTF-8",
        ),
        (b'{"messages": "\xff\xff"}', "the body is not UTF-8 (byte 14); encode it as UTF-8"),
        (b'{"messages":\n [,]}', "the body is not JSON: Expecting value in line 2, column 3"),
        (b"", "the body is not JSON: Expecting value in line 1, column 1"),
        (b"messages=x", "the body is not JSON: Expecting value in line 1, column 1"),
    ],
)
def test_a_body_that_cannot_be_read_is_named_for_what_it_is(app, content, problem):
    error = send(app, "POST", CHAT, content).error()
    assert (error["message"], error["code"]) == (f"body: {problem}", "json_invalid")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_json_in_every_encoding_of_unicode_is_accepted(app, encoding):
    body = '{"messages": [{"role": "user", "content": "say 你好👋"}]}'.encode(encoding)
    assert send(app, "POST", CHAT, body).json()["choices"][0]["message"]["content"] == "你好👋"


HALF = r'"\ud800"'


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (f'"messages": [{{"role": "user", "content": {HALF}}}]', "messages.0.content"),
        (f'"messages": [{{"role": "user", "content": "x"}}], "user": {HALF}', "user"),
        (f'"messages": [{{"role": "user", "content": "x"}}], "stop": ["a", {HALF}]', "stop.1"),
        (f'"messages": [{{"role": "user", "content": "x"}}], "metadata": {{{HALF}: "x"}}', "metadata"),
        (f'"messages": [], "tools": [{{"function": {{"name": "f", "parameters": {{"enum": [{HALF}]}}}}}}]',
         "tools.0.function.parameters.enum.0"),
        (f'"messages": [], "response_format": {{"json_schema": {{"schema": {{"const": {HALF}}}}}}}',
         "response_format.json_schema.schema.const"),
        (f'"messages": [], "unknown": [[{HALF}]]', "unknown.0.0"),
    ],
)  # fmt: skip
def test_half_a_character_in_any_string_is_rejected_with_its_field(app, fields, param):
    for path in (CHAT, "/v1/completions", "/tokenize"):
        reply = send(app, "POST", path, f"{{{fields}}}".encode())
        assert (reply.status, reply.error()["param"], reply.error()["code"]) == (400, param, "string_unicode")


def test_whole_characters_in_escapes_are_accepted(app):
    body = rb'{"messages": [{"role": "user", "content": "say \ud83d\udc4b \\\\ud800"}]}'
    assert send(app, "POST", CHAT, body).json()["choices"][0]["message"]["content"] == "👋 \\\\ud800"


def test_invalid_json_arguments_of_an_earlier_tool_call_are_rejected_with_their_path(app):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{'a': 1}"}}
    turns = [HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "1"}]
    reply = send(app, "POST", CHAT, {"messages": turns})
    assert (reply.status, reply.error()["code"]) == (400, "invalid_messages")
    assert "messages.1.tool_calls.0.function.arguments is not JSON" in reply.error()["message"]


@pytest.mark.parametrize("depth", [33, 400, 900])
def test_deeply_nested_tools_and_schemas_are_rejected(app, depth):
    """As indented JSON in the prompt, 900 levels would be megabytes of blanks."""
    nested = b'{"a":' * depth + b"1" + b"}" * depth
    tools = b'"tools": [{"type": "function", "function": {"name": "f", "parameters": ' + nested + b"}}]"
    schema = b'"response_format": {"type": "json_schema", "json_schema": {"name": "f", "schema": ' + nested + b"}}"
    for field in (tools, schema):
        reply = send(app, "POST", CHAT, b'{"messages": [{"role": "user", "content": "x"}], ' + field + b"}")
        assert (reply.status, "nested deeper than 32" in reply.error()["message"]) == (400, True)


def test_long_tool_definitions_are_rejected(app):
    wide = {"type": "function", "function": {"name": "f", "parameters": {"a": "x" * 100_000}}}
    assert send(app, "POST", CHAT, {"messages": [HELLO], "tools": [wide]}).error()["param"].startswith("tools.0")
    many = [{"type": "function", "function": {"name": "f", "description": "x" * 1000}}] * 110
    assert send(app, "POST", CHAT, {"messages": [HELLO], "tools": many}).error()["param"] == "tools"


def test_an_internal_error_reveals_no_details(app):
    reply = send(app, "POST", CHAT, {"messages": [{"role": "user", "content": "fail 3"}]})
    assert reply.status == 500
    assert reply.error() == {
        "message": "the engine failed", "type": "server_error", "param": None, "code": "engine_error"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("script", "status", "code"), [("refuse", 400, "invalid_request"), ("broken", 500, "engine_error")]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_user_error_of_the_engine_is_400_and_a_model_error_is_500(app, script, status, code, stream):
    reply = send(app, "POST", CHAT, {"messages": [{"role": "user", "content": script}], "stream": stream})
    if stream:
        assert reply.status == 200
        assert f'"code": "{code}"'.encode() in reply.body
        assert not reply.body.endswith(b"[DONE]\n\n")
    else:
        assert (reply.status, reply.error()["code"]) == (status, code)
    assert send(app, "POST", CHAT, {"messages": [HELLO]}).status == 200
