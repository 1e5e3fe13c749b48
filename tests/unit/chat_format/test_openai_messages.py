"""OpenAI messages as dicts, as in training rows. As requests: tests/unit/api/test_tools.py, test_training_ids.py."""

import pytest

from entrypoints.chat_format.openai_messages import from_openai_messages
from entrypoints.chat_format.prompt import Message
from entrypoints.chat_format.tool_calls import TOOLS_INTRODUCTION
from entrypoints.errors import UserError

USER = {"role": "user", "content": "u"}
TOOL = {"type": "function", "function": {"name": "f"}}


def calling(call, role="assistant"):
    return {"role": role, "content": None, "tool_calls": call}


def test_the_model_receives_name_description_and_parameters_of_a_tool_in_this_order():
    function = {"strict": True, "parameters": {"b": None}, "name": "f", "description": "d"}
    (system, _) = from_openai_messages([USER], [{"type": "function", "function": function}])
    assert system == Message(
        "system", TOOLS_INTRODUCTION, tools=({"name": "f", "description": "d", "parameters": {"b": None}},)
    )
    assert list(system.tools[0]) == ["name", "description", "parameters"]


def test_tools_on_a_system_turn_are_converted_in_the_same_way():
    own = {"role": "system", "content": "s", "tools": [{"parameters": {}, "name": "f", "returns": "text"}]}
    (system, _) = from_openai_messages([own, USER])
    assert system == from_openai_messages([{"role": "system", "content": "s"}, USER], [own["tools"][0]])[0]
    assert list(system.tools[0]) == ["name", "parameters"]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({**USER, "mood": 1}, "turn 1 has an unknown field 'mood'"),
        ({**USER, "weight": 1}, "turn 1 has weight 1 and role 'user'"),
        ({**USER, "loss": True}, "turn 1 has loss True and role 'user'"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "turn 1 has weight 0.5"),
        ({"role": "assistant", "content": "a", "loss": "no"}, "turn 1 has loss 'no'"),
        ({**USER, "audio": {"id": "a"}}, "turn 1 has an unknown field 'audio'"),
        ({"role": "critic", "content": "x"}, "turn 1 has role 'critic'"),
        ({"role": ["user"], "content": "x"}, "turn 1 has role"),
        ({"role": "user", "content": None}, "turn 1 has content that is not a string"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "turn 1 has content that is not a string"),
        (calling([TOOL], "user"), "turn 1 has tool_calls that are not a list on an assistant turn"),
        (calling("f()"), "turn 1 has tool_calls that are not a list on an assistant turn"),
        (calling([5]), "messages.1.tool_calls.0 is not a function call"),
        (calling([{"type": "custom", "function": {"name": "f"}}]), "messages.1.tool_calls.0 is not a function call"),
        (calling([TOOL, {"function": {"arguments": "{}"}}]), "messages.1.tool_calls.1 is not a function call"),
        (
            calling([{"function": {"name": "f", "arguments": "[1]"}}]),
            "messages.1.tool_calls.0.function.arguments is not a JSON object",
        ),
        (calling([{"function": {"name": "f", "arguments": 5}}]), "function.arguments is not JSON"),
        (calling([{"function": {"name": "f", "arguments": '{"a": NaN}'}}]), "function.arguments is not JSON"),
        (calling([{"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}]), "function.arguments is not JSON"),
        (calling([{"function": {"name": "f g", "arguments": "{}"}}]), "function.name 'f g' is empty or has blanks"),
        (calling([{"function": {"name": "", "arguments": "{}"}}]), "function.name '' is empty or has blanks"),
        (calling([{"function": {"name": "f", "arguments": "{'a': 1}"}}]), "function.arguments is not JSON"),
        ({"role": "system", "content": "", "tools": [{"description": "d"}]}, "turn 1: tools.0 has no name"),
        ({"role": "system", "content": "", "tools": "f"}, "turn 1 has tools that are not a list on a system turn"),
    ],
)
def test_a_malformed_message_is_reported_with_its_index(message, problem):
    with pytest.raises(UserError) as caught:
        from_openai_messages([USER, message])
    assert problem in caught.value.problem


def calls(*ids):
    return calling([{"id": id_, "function": {"name": f"f{id_}"}} for id_ in ids])


def results(*ids):
    return [{"role": "tool", "tool_call_id": id_, "content": f"result {id_}"} for id_ in ids]


def observed(*messages):
    return [turn.content for turn in from_openai_messages([USER, *messages]) if turn.role == "observation"]


def test_results_are_in_the_order_of_their_calls():
    assert observed(calls("a", "b", "c"), *results("c", "a", "b")) == ["result a", "result b", "result c"]
    again = [calls("a", "b"), *results("b", "a"), USER, calls("b", "a"), *results("a", "b")]
    assert observed(*again) == ["result a", "result b", "result b", "result a"]


def test_results_without_ids_stay_in_place():
    plain = [{"role": "tool", "content": "2"}, {"role": "observation", "content": "1"}]
    assert observed(calls("a", "b"), *plain) == ["2", "1"]
    assert observed(calls("x", "x"), *results("x", "x")) == ["result x", "result x"]


def test_results_that_another_message_separates_are_accepted():
    first, second = results("b", "a")
    assert observed(calls("a", "b"), second, USER, first) == ["result a", "result b"]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([calls("a"), *results("b")], "messages.2.tool_call_id 'b' names no call of an earlier message"),
        ([*results("a"), calls("a")], "messages.1.tool_call_id 'a' names no call of an earlier message"),
        ([calls("a"), {**results("a")[0], "tool_call_id": ["a"]}], "messages.2.tool_call_id"),
        ([calls("a", "b", "c"), *results("a", "c")], "messages.2: the result of the call 'b' is missing"),
    ],
)
def test_a_result_that_belongs_to_no_call_is_reported(messages, problem):
    with pytest.raises(UserError) as caught:
        from_openai_messages([USER, *messages])
    assert caught.value.problem.startswith(problem)


@pytest.mark.parametrize(
    ("tool", "problem"),
    [
        (5, "tools.1 has no name"),
        ({"type": "function", "function": {}}, "tools.1 has no name"),
        ({"name": 5}, "tools.1 has a name of the wrong type"),
        ({"name": "f", "parameters": "{}"}, "tools.1 has a parameters of the wrong type"),
    ],
)
def test_a_malformed_tool_is_reported_with_its_index(tool, problem):
    with pytest.raises(UserError) as caught:
        from_openai_messages([USER], [TOOL, tool])
    assert problem in caught.value.problem


def test_tools_in_both_places_are_rejected():
    with pytest.raises(UserError, match="tools are given both beside the conversation and in a turn of it"):
        from_openai_messages([{"role": "system", "content": "", "tools": [TOOL]}, USER], [TOOL])


@pytest.mark.parametrize("arguments", ['{"max-results": 5}', {"max-results": 5}])
def test_arguments_are_an_object_or_its_json_text(arguments):
    (turn,) = from_openai_messages([calling([{"function": {"name": "f", "arguments": arguments}}])])
    assert turn == Message("assistant", "```python\ntool_call(**{'max-results': 5})\n```", "f")


@pytest.mark.parametrize(
    ("marks", "learned"),
    [({}, True), ({"weight": 1}, True), ({"weight": 0}, False), ({"loss": False}, False), ({"loss": True}, True),
     ({"weight": None}, True), ({"weight": 1, "loss": False}, False)],
)  # fmt: skip
def test_weight_and_loss_mark_an_answer_with_its_calls_as_learned_or_only_read(marks, learned):
    message = {**calling([TOOL]), "content": "a", **marks}
    assert [turn.learn for turn in from_openai_messages([USER, message])] == [True, learned, learned]
    assert from_openai_messages([{**USER, "loss": False, "weight": 0}])[0].role == "user"
