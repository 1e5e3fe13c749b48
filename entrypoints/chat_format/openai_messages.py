"""OpenAI's messages and tools to ChatGLM3's turns; shared by the API and by training rows.

ChatGLM3 receives its tools in the system turn. It calls a tool in an assistant turn whose metadata is the tool's name
and whose body is a code block `tool_call(key=literal)`, and receives the result in an observation turn. ChatGLM3's own
form is accepted too: role observation, metadata on an assistant turn, tools on a system turn.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from entrypoints.chat_format.prompt import Message, message_from_dict
from entrypoints.chat_format.tool_calls import TOOLS_INTRODUCTION, write_tool_call
from entrypoints.errors import UserError

ROLE_NAMES = {"developer": "system", "tool": "observation"}  # OpenAI's roles that ChatGLM3 names differently
RESULT_ROLES = ("tool", "observation")
# Labels without an effect on the prompt. `tool_call_id` has done its work in `results_in_call_order`.
IGNORED_FIELDS = ("name", "id", "type", "tool_call_id", "refusal", "annotations")
LEARNED_FIELDS = ("weight", "loss")  # OpenAI's and ChatGLM3's mark of an answer that training learns, or only reads
CONVERTED_FIELDS = frozenset({*IGNORED_FIELDS, *LEARNED_FIELDS, "tool_calls"})
TOOL_FIELDS = {"name": str, "description": str, "parameters": dict}  # sent to the model, in this order


def from_openai_messages(messages: Sequence[dict[str, Any]], tools: Sequence[Any] = ()) -> list[Message]:
    """The conversation in ChatGLM3's roles; the tools are added to the first system turn, which is created if needed.

    Results of tools come in the order of their calls, by `tool_call_id`.
    Raises UserError: names the message with an unknown field or role, a call whose arguments are not a JSON object, or
    a result whose call is unknown.
    """
    numbered = results_in_call_order(messages)
    turns = [turn for index, message in numbered for turn in _convert_message(message, index)]
    offered = tuple(_tool_definition(tool, f"tools.{number}") for number, tool in enumerate(tools))
    if not offered:
        return turns
    if any(turn.tools for turn in turns):
        raise UserError("tools are given both beside the conversation and in a turn of it", "remove one of them")
    if turns and turns[0].role == "system":
        return [replace(turns[0], tools=offered), *turns[1:]]
    return [Message("system", TOOLS_INTRODUCTION, tools=offered), *turns]


def is_empty(value: object) -> bool:
    """True for null, "", [] and {}: a field with such a value says nothing, whatever its name is."""
    return value is None or value in ("", [], {})


def results_in_call_order(messages: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """The messages with their indexes, each run of results in the order of the calls that its ids name.

    ChatGLM3's turns have no ids: the model tells results apart by their order. A result without an id stays in place.
    Raises UserError: a result names no call before it, or the result of an earlier call of the same message is missing.
    """
    ordered: list[tuple[int, dict[str, Any]]] = []
    known: set[str] = set()  # ids of all calls so far
    for is_result, run in itertools.groupby(enumerate(messages), lambda pair: pair[1].get("role") in RESULT_ROLES):
        numbered = list(run)
        if not is_result:
            ordered += numbered
            known.update(id_ for _, message in numbered for id_ in _call_ids(message))
            continue
        for index, message in numbered:
            id_ = message.get("tool_call_id")
            if id_ and not (isinstance(id_, str) and id_ in known):
                raise UserError(
                    f"messages.{index}.tool_call_id {str(id_)[:80]!r} names no call of an earlier message",
                    "send the id of the call that this is the result of",
                )
        ordered += _in_call_order(numbered, _call_ids(ordered[-1][1]) if ordered else [])
    return ordered


def _call_ids(message: dict[str, Any]) -> list[str]:
    calls = message.get("tool_calls")
    ids = [call.get("id") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return [id_ if isinstance(id_, str) else "" for id_ in ids]


def _in_call_order(
    results: list[tuple[int, dict[str, Any]]], call_ids: Sequence[str]
) -> list[tuple[int, dict[str, Any]]]:
    """Results of one message's calls in their order; unchanged if one of them belongs to none of these calls."""
    free = list(enumerate(call_ids))  # calls without a result so far
    placed = []
    for index, message in results:
        call = next((one for one in free if one[1] and one[1] == message.get("tool_call_id")), None)
        if call is None:
            return results
        free.remove(call)
        placed.append((call[0], index, message))
    placed.sort(key=lambda result: result[0])
    if missing := [id_ for number, id_ in free if number < placed[-1][0]]:
        raise UserError(
            f"messages.{results[0][0]}: the result of the call {missing[0]!r} is missing",
            "send a tool message for every call of the assistant message",
        )
    return [(index, message) for _, index, message in placed]


def _convert_message(message: dict[str, Any], index: int) -> list[Message]:
    """One turn; an assistant message gives one turn for its text and one for each tool call."""
    role, calls = message.get("role"), message.get("tool_calls") or []
    if calls and (role != "assistant" or not isinstance(calls, list)):
        raise UserError(
            f"turn {index} has tool_calls that are not a list on an assistant turn",
            "only assistant messages can call tools",
        )
    fields = {
        key: value
        for key, value in message.items()
        if key not in CONVERTED_FIELDS and (key == "content" or not is_empty(value))
    }
    fields["role"] = ROLE_NAMES.get(role, role) if isinstance(role, str) else role
    fields["content"] = _text_content(message)
    turn = message_from_dict(fields, index)
    learn = _is_learned(message, index)
    if turn.role != "assistant":
        if not turn.metadata and not turn.tools:
            return [turn]
        tools = tuple(_tool_definition(tool, f"turn {index}: tools.{number}") for number, tool in enumerate(turn.tools))
        return [replace(turn, metadata="", tools=tools)]
    call_turns = [_tool_call_turn(call, f"messages.{index}.tool_calls.{n}") for n, call in enumerate(calls)]
    turns = [turn, *call_turns] if turn.content or not calls else call_turns
    return turns if learn else [replace(turn, learn=False) for turn in turns]


def _is_learned(message: dict[str, Any], index: int) -> bool:
    """Whether training learns an answer; raises UserError for a mark that is not 0 or 1, or on another turn."""
    marks = {name: message[name] for name in LEARNED_FIELDS if message.get(name) is not None}
    if not marks:
        return True
    for name, mark in marks.items():
        if not isinstance(mark, bool | int | float) or mark not in (0, 1):
            raise UserError(f"turn {index} has {name} {mark!r}", "use 0 or 1: an answer is learned, or only read")
        if mark and message.get("role") != "assistant":
            problem = f"turn {index} has {name} {mark!r} and role {message.get('role')!r}"
            raise UserError(problem, "only answers of the assistant are learned")
    return all(marks.values())


def _text_content(message: dict[str, Any]) -> Any:
    """The content as one string, null as ""; unchanged if it is neither nor a list of text parts."""
    content = message.get("content")
    if content is None and message.get("role") != "user":
        return ""
    if not isinstance(content, list):
        return content
    parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    texts = [text for text in parts if isinstance(text, str)]
    return "".join(texts) if len(texts) == len(content) else content


def _tool_call_turn(call: Any, where: str) -> Message:
    is_function = isinstance(call, dict) and call.get("type", "function") == "function"
    function = call.get("function") if is_function else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        raise UserError(f"{where} is not a function call", "give its function a name and arguments")
    if name != "".join(name.split()) or not name:  # the name is one line of the answer
        raise UserError(f"{where}.function.name {name!r} is empty or has blanks", "use letters, digits, _, - and .")
    return Message("assistant", _tool_call_code(function.get("arguments"), f"{where}.function.arguments"), name)


def _tool_call_code(arguments: Any, where: str) -> str:
    """arguments: an object, or its JSON text, as OpenAI sends it."""
    try:
        values = arguments if isinstance(arguments, dict) else json.loads(arguments or "{}")
        if isinstance(values, dict):
            return write_tool_call(values)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{where} is not JSON ({error})", "send the string that the model's answer contained"
        ) from error
    raise UserError(f"{where} is not a JSON object", "send an object with the parameters as keys")


def _tool_definition(tool: Any, where: str) -> dict[str, Any]:
    """Name, description and parameters of a tool in OpenAI's form or in ChatGLM3's, which is the function alone."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not function.get("name"):
        raise UserError(f"{where} has no name", "give it a name, a description and parameters")
    definition = {key: function[key] for key in TOOL_FIELDS if function.get(key) is not None}
    wrong = [key for key, value in definition.items() if not isinstance(value, TOOL_FIELDS[key])]
    if wrong:
        raise UserError(
            f"{where} has a {wrong[0]} of the wrong type", "name and description are strings, parameters an object"
        )
    return definition
