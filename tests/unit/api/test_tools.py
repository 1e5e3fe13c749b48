import json

import pytest
from asgi import send
from gbnf_matcher import matches

from entrypoints.api.openai_schema import ChatMessage, NamedToolChoice, Tool
from entrypoints.api.tools import required_call_grammar, to_openai, to_prompt_messages
from entrypoints.chat_format.prompt import Message
from entrypoints.chat_format.tool_calls import TOOLS_INTRODUCTION, ToolCall, parse_tool_call
from entrypoints.errors import UserError

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
    return to_prompt_messages([ChatMessage.model_validate(message) for message in messages], tools)


def calling(arguments, content=None, name="get_weather"):
    call = {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def test_openais_roles_map_to_chatglm3s():
    assert turns(
        {"role": "developer", "content": "d"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "tool", "content": "t"},
        {"role": "observation", "content": "o"},
    ) == [
        Message("system", "d"), Message("user", "u"), Message("assistant", "a"), Message("observation", "t"),
        Message("observation", "o"),
    ]  # fmt: skip


def test_tools_are_added_to_the_system_message_of_the_request():
    found = turns({"role": "system", "content": "SYS_MARK_77"}, {"role": "user", "content": "u"}, tools=[WEATHER])
    assert found == [Message("system", "SYS_MARK_77", tools=OFFERED), Message("user", "u")]


def test_tools_create_a_system_message_if_there_is_none():
    assert turns({"role": "user", "content": "u"}, tools=[WEATHER])[0] == Message(
        "system", TOOLS_INTRODUCTION, tools=OFFERED
    )


def test_a_call_and_its_result_become_metadata_and_observation():
    found = turns(
        {"role": "user", "content": "u"},
        calling('{"city": "北京", "days": 2, "wet": true, "unit": null}'),
        {"role": "tool", "tool_call_id": "c1", "content": "31C"},
    )
    body = "```python\ntool_call(city='北京', days=2, wet=True, unit=None)\n```"
    assert found[1:] == [Message("assistant", body, "get_weather"), Message("observation", "31C")]


def test_missing_content_and_arguments_are_empty():
    call = {"id": "c1", "function": {"name": "clock", "arguments": None}}
    found = turns(
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": None},
        {"role": "assistant", "content": None},
    )
    assert found == [
        Message("assistant", "```python\ntool_call()\n```", "clock"), Message("observation", ""),
        Message("assistant", ""),
    ]  # fmt: skip


def test_text_before_a_call_is_a_separate_turn():
    assert turns(calling("{}", "稍等")) == [
        Message("assistant", "稍等"), Message("assistant", "```python\ntool_call()\n```", "get_weather")
    ]  # fmt: skip


def test_a_call_in_chatglm3s_format_is_kept():
    own = {"role": "assistant", "content": "```python\ntool_call(a=1)\n```", "metadata": "clock"}
    assert turns(own) == [Message("assistant", own["content"], "clock")]


def test_an_empty_answer_stays_a_turn():
    assert turns({"role": "assistant", "content": ""}) == [Message("assistant", "")]


@pytest.mark.parametrize("arguments", ["{", "[1]", "null", "5", '"x"', "{'a': 1}", "[" * 100_000, "9" * 5000, "\x00"])
def test_arguments_that_are_not_an_object_are_rejected_with_their_path(arguments):
    with pytest.raises(
        UserError, match=r"messages\.1\.tool_calls\.0\.function\.arguments is not (valid JSON|JSON|a JSON object)"
    ):
        turns({"role": "user", "content": "u"}, calling(arguments))


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_arguments_of_any_depth_are_encoded_or_rejected(opening):
    """The recursion limits of json and repr() differ, and depend on the depth of the call stack."""
    closing = "]" if opening == "[" else "}"
    for depth in range(50, 1200, 7):
        nested = '{"x": ' + opening * depth + "1" + closing * depth + "}"
        try:
            problem = "" if turns(calling(nested)) else "no turns"
        except UserError as error:
            problem = str(error)
        assert not problem or problem.startswith("messages.0.tool_calls.0.function.arguments"), problem


def test_missing_arguments_are_an_empty_object():
    assert turns(calling(""))[0].content == "```python\ntool_call()\n```"


@pytest.mark.parametrize(
    "arguments", [{"a": 1, "b": [1, 2.5, {"c": None}], "d": "引号\"'\n```"}, {}, {"s": "\u2028\x00\\"}, {"b": False}]
)
def test_a_call_survives_the_round_trip(arguments):
    (turn,) = turns(calling(json.dumps(arguments, ensure_ascii=False)))
    call = parse_tool_call(turn.metadata, turn.content)
    assert call.arguments == arguments
    assert json.loads(to_openai(call, "id")["function"]["arguments"]) == arguments


def test_a_parsed_call_has_openais_format():
    assert to_openai(ToolCall("f", {"城市": "北京"}), "call_1") == {
        "id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"城市": "北京"}'}
    }  # fmt: skip


CHOSEN = NamedToolChoice.model_validate({"type": "function", "function": {"name": "clock"}})


@pytest.mark.parametrize(
    ("choice", "callable_tools"),
    [
        (None, None), ("auto", None), ("none", None), ("required", ["get_weather", "clock"]),
        ("any", ["get_weather", "clock"]), (CHOSEN, ["clock"]),
    ],
)  # fmt: skip
def test_a_required_call_is_one_of_the_offered_tools(choice, callable_tools):
    grammar = required_call_grammar(choice, [WEATHER, CLOCK])
    assert (grammar is None) == (callable_tools is None)
    for name in ("get_weather", "clock", "nobody") if grammar else ():
        assert matches(grammar, f"{name}\n```python\ntool_call()\n```") == (name in callable_tools)


@pytest.mark.parametrize(
    ("choice", "tools"),
    [
        ("required", []),
        ("any", []),
        (NamedToolChoice.model_validate({"function": {"name": "nobody"}}), [WEATHER]),
    ],
)
def test_an_impossible_tool_choice_is_rejected(choice, tools):
    with pytest.raises(UserError, match="tool_choice"):
        required_call_grammar(choice, tools)


def test_the_engine_receives_the_grammar_of_a_required_call(app, engine):
    tools = [WEATHER.model_dump(), CLOCK.model_dump()]
    body = {"messages": [{"role": "user", "content": "raw clock\n```python\ntool_call()\n```"}], "tools": tools}
    for choice in ("required", "any", CHOSEN.model_dump()):
        reply = send(app, "POST", "/v1/chat/completions", {**body, "tool_choice": choice})
        assert reply.json()["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "clock"
        assert engine.samplings[-1].grammar.startswith("root ::= ")
    engine.features = engine.features - {"grammar"}
    refused = send(app, "POST", "/v1/chat/completions", {**body, "tool_choice": "required"})
    assert (refused.status, refused.error()["param"]) == (400, "tool_choice")
