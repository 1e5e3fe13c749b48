"""Messages as plain dicts, from rows; the same from requests: tests/unit/api/test_tools.py and test_training_ids.py."""

import pytest

from entrypoints.errors import UserError
from entrypoints.openai_turns import to_turns
from entrypoints.prompt import TOOLS_INTRODUCTION, Message

USER = {"role": "user", "content": "u"}
TOOL = {"type": "function", "function": {"name": "f"}}


def calling(call, role="assistant"):
    return {"role": role, "content": None, "tool_calls": call}


def test_a_tool_is_its_name_description_and_parameters_in_this_order():
    function = {"strict": True, "parameters": {"b": None}, "name": "f", "description": "d"}
    (system, _) = to_turns([USER], [{"type": "function", "function": function}])
    assert system == Message(
        "system", TOOLS_INTRODUCTION, tools=({"name": "f", "description": "d", "parameters": {"b": None}},)
    )
    assert list(system.tools[0]) == ["name", "description", "parameters"]


def test_the_tools_of_a_system_turn_are_told_in_the_same_way():
    own = {"role": "system", "content": "s", "tools": [{"parameters": {}, "name": "f", "returns": "text"}]}
    (system, _) = to_turns([own, USER])
    assert system == to_turns([{"role": "system", "content": "s"}, USER], [own["tools"][0]])[0]
    assert list(system.tools[0]) == ["name", "parameters"]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({**USER, "weight": 1}, "turn 1 has an unknown field 'weight'"),
        ({**USER, "audio": {"id": "a"}}, "turn 1 has an unknown field 'audio'"),
        ({"role": "critic", "content": "x"}, "turn 1 has role 'critic'"),
        ({"role": ["user"], "content": "x"}, "turn 1 has role"),
        ({"role": "tool", "content": None}, "turn 1 has no text as content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "turn 1 has no text as content"),
        (calling([TOOL], "user"), "turn 1 has tool_calls that are no list on an assistant turn"),
        (calling("f()"), "turn 1 has tool_calls that are no list on an assistant turn"),
        (calling([5]), "messages.1.tool_calls.0 is no call of a function"),
        (calling([{"type": "custom", "function": {"name": "f"}}]), "messages.1.tool_calls.0 is no call of a function"),
        (calling([TOOL, {"function": {"arguments": "{}"}}]), "messages.1.tool_calls.1 is no call of a function"),
        (
            calling([{"function": {"name": "f", "arguments": "[1]"}}]),
            "messages.1.tool_calls.0.function.arguments is no",
        ),
        (calling([{"function": {"name": "f", "arguments": {"a": 1}}}]), "function.arguments is no JSON"),
        (calling([{"function": {"name": "f", "arguments": "{'a': 1}"}}]), "function.arguments is no JSON"),
        ({"role": "system", "content": "", "tools": [{"description": "d"}]}, "turn 1: tools.0 has no name"),
        ({"role": "system", "content": "", "tools": "f"}, "turn 1 has tools that are no list on a system turn"),
    ],
)
def test_a_malformed_message_is_named_with_its_number(message, problem):
    with pytest.raises(UserError) as caught:
        to_turns([USER, message])
    assert problem in caught.value.problem


@pytest.mark.parametrize(
    ("tool", "problem"),
    [
        (5, "tools.1 has no name"),
        ({"type": "function", "function": {}}, "tools.1 has no name"),
        ({"name": 5}, "tools.1 has a name of another kind"),
        ({"name": "f", "parameters": "{}"}, "tools.1 has a parameters of another kind"),
    ],
)
def test_a_malformed_tool_is_named_with_its_number(tool, problem):
    with pytest.raises(UserError) as caught:
        to_turns([USER], [TOOL, tool])
    assert problem in caught.value.problem


def test_tools_in_both_places_are_refused():
    with pytest.raises(UserError, match="tools stand both beside the conversation and on a turn of it"):
        to_turns([{"role": "system", "content": "", "tools": [TOOL]}, USER], [TOOL])
