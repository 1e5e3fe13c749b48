import json

import pytest

from entrypoints.answer import ToolCall, parse_tool_call
from entrypoints.api.openai_schema import ChatMessage, NamedTool, Tool
from entrypoints.api.tools import call_opening, forced_tool, to_openai, to_turns
from entrypoints.errors import UserError
from entrypoints.prompt import TOOLS_INTRODUCTION, Message

WEATHER = Tool.model_validate(
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "天气",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
            "strict": True,
        },
    }
)
CLOCK = Tool.model_validate({"function": {"name": "clock"}})
OFFERED = (
    {
        "name": "get_weather",
        "description": "天气",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
)


def turns(*messages, tools=()):
    return to_turns([ChatMessage.model_validate(message) for message in messages], tools)


def calling(arguments, content=None, name="get_weather"):
    call = {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def test_openais_roles_are_chatglm3s():
    assert turns(
        {"role": "developer", "content": "d"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "tool", "content": "t", "tool_call_id": "c1"},
        {"role": "observation", "content": "o"},
    ) == [
        Message("system", "d"), Message("user", "u"), Message("assistant", "a"), Message("observation", "t"),
        Message("observation", "o"),
    ]  # fmt: skip


def test_tools_join_the_callers_own_system_turn():
    """D5."""
    found = turns({"role": "system", "content": "SYS_MARK_77"}, {"role": "user", "content": "u"}, tools=[WEATHER])
    assert found == [Message("system", "SYS_MARK_77", tools=OFFERED), Message("user", "u")]


def test_tools_make_a_system_turn_where_there_is_none():
    assert turns({"role": "user", "content": "u"}, tools=[WEATHER])[0] == Message(
        "system", TOOLS_INTRODUCTION, tools=OFFERED
    )


def test_a_call_and_its_result_become_metadata_and_observation():
    """D6."""
    found = turns(
        {"role": "user", "content": "u"},
        calling('{"city": "北京", "days": 2, "wet": true, "unit": null}'),
        {"role": "tool", "tool_call_id": "c1", "content": "31C"},
    )
    body = "```python\ntool_call(city='北京', days=2, wet=True, unit=None)\n```"
    assert found[1:] == [Message("assistant", body, "get_weather"), Message("observation", "31C")]


def test_text_before_a_call_is_a_turn_of_its_own():
    assert turns(calling("{}", "稍等")) == [
        Message("assistant", "稍等"), Message("assistant", "```python\ntool_call()\n```", "get_weather")
    ]  # fmt: skip


def test_a_call_in_chatglm3s_own_form_is_kept():
    own = {"role": "assistant", "content": "```python\ntool_call(a=1)\n```", "metadata": "clock"}
    assert turns(own) == [Message("assistant", own["content"], "clock")]


def test_an_answer_of_nothing_stays_a_turn():
    assert turns({"role": "assistant", "content": ""}) == [Message("assistant", "")]


@pytest.mark.parametrize("arguments", ["{", "[1]", "null", "5", '"x"', "{'a': 1}", "[" * 100_000, "9" * 5000, "\x00"])
def test_arguments_that_are_no_object_are_named(arguments):
    with pytest.raises(UserError, match=r"messages\.1\.tool_calls\.0\.function\.arguments is no JSON"):
        turns({"role": "user", "content": "u"}, calling(arguments))


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_arguments_of_any_depth_are_written_or_refused(opening):
    """The bounds of json and of repr() differ, and depend on how deep we are called."""
    closing = "]" if opening == "[" else "}"
    for depth in range(50, 1200, 7):
        nested = '{"x": ' + opening * depth + "1" + closing * depth + "}"
        try:
            assert turns(calling(nested))
        except UserError as error:
            assert "messages.0.tool_calls.0.function.arguments" in str(error)


def test_no_arguments_are_an_empty_object():
    assert turns(calling(""))[0].content == "```python\ntool_call()\n```"


@pytest.mark.parametrize(
    "arguments", [{"a": 1, "b": [1, 2.5, {"c": None}], "d": "引号\"'\n```"}, {}, {"s": "\u2028\x00\\"}, {"b": False}]
)
def test_a_call_survives_the_round_trip(arguments):
    (turn,) = turns(calling(json.dumps(arguments, ensure_ascii=False)))
    call = parse_tool_call(turn.metadata, turn.content)
    assert call.arguments == arguments
    assert json.loads(to_openai(call, "id")["function"]["arguments"]) == arguments


def test_a_call_is_handed_out_in_openais_shape():
    assert to_openai(ToolCall("f", {"城市": "北京"}), "call_1") == {
        "id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"城市": "北京"}'}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "tools", "forced"),
    [
        (None, [WEATHER], None),
        ("auto", [WEATHER], None),
        ("none", [], None),
        ("required", [WEATHER], "get_weather"),
        (NamedTool.model_validate({"type": "function", "function": {"name": "clock"}}), [WEATHER, CLOCK], "clock"),
    ],
)
def test_a_choice_forces_one_tool_or_none(choice, tools, forced):
    assert forced_tool(choice, tools) == forced


@pytest.mark.parametrize(
    ("choice", "tools"),
    [
        ("required", []),
        ("required", [WEATHER, CLOCK]),
        (NamedTool.model_validate({"function": {"name": "nobody"}}), [WEATHER]),
    ],
)
def test_a_choice_that_cannot_be_kept_is_refused(choice, tools):
    with pytest.raises(UserError, match="tool_choice"):
        forced_tool(choice, tools)


def test_a_forced_call_begins_as_the_model_would_begin_it():
    header, body = call_opening("clock")
    assert parse_tool_call("clock", f"{body}a=1)\n```").arguments == {"a": 1}
    assert header == "clock\n"
