"""OpenAI's messages and tools to ChatGLM3's own turns: the same for what the API is sent and for rows to train on.

ChatGLM3 is told of tools in the system turn, calls one in an assistant turn whose metadata is the tool's name and whose
body is a code block `tool_call(key=literal)`, and reads the result in an observation turn. Its own form may be sent
too: role observation, metadata on an assistant turn, tools on a system turn.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from entrypoints.errors import UserError
from entrypoints.prompt import TOOLS_INTRODUCTION, Message, from_dict

ROLE_NAMES = {"developer": "system", "tool": "observation"}  # OpenAI's; the others are ChatGLM3's too
LABELS = ("name", "tool_call_id", "refusal", "annotations")  # they change no answer
NULLS = ("audio", "function_call")  # null in the answers of OpenAI's client, which callers send back as they are
DEFINITION = {"name": str, "description": str, "parameters": dict}  # what the model is told of a tool, in this order


def to_turns(messages: Sequence[dict], tools: Sequence[Any] = ()) -> list[Message]:
    """The conversation in ChatGLM3's roles; the tools join the caller's own first system turn, or make one.

    Raises UserError naming the message with an unknown field or role, or a call whose arguments are no JSON object.
    """
    turns = [turn for index, message in enumerate(messages) for turn in _turns(message, index)]
    offered = tuple(_definition(tool, f"tools.{number}") for number, tool in enumerate(tools))
    if not offered:
        return turns
    if any(turn.tools for turn in turns):
        raise UserError("tools stand both beside the conversation and on a turn of it", "leave one of them out")
    if turns and turns[0].role == "system":
        return [replace(turns[0], tools=offered), *turns[1:]]
    return [Message("system", TOOLS_INTRODUCTION, tools=offered), *turns]


def _turns(message: dict, index: int) -> list[Message]:
    """An assistant's message is a turn for its text and one for each call; every other message is one turn."""
    role, calls = message.get("role"), message.get("tool_calls") or []
    if calls and (role != "assistant" or not isinstance(calls, list)):
        raise UserError(
            f"turn {index} has tool_calls that are no list on an assistant turn", "calls are an assistant's"
        )
    own = {key: value for key, value in message.items() if key not in (*LABELS, "tool_calls")}
    own = {key: value for key, value in own.items() if key not in NULLS or value is not None}
    own |= {"role": ROLE_NAMES.get(role, role) if isinstance(role, str) else role, "content": _text(message, calls)}
    turn = from_dict(own, index)
    if turn.role != "assistant":
        tools = tuple(_definition(tool, f"turn {index}: tools.{number}") for number, tool in enumerate(turn.tools))
        return [replace(turn, metadata="", tools=tools)]
    spoken = [turn] if turn.content else []
    return spoken + [_call(call, f"messages.{index}.tool_calls.{n}") for n, call in enumerate(calls)] or [
        Message("assistant", "")
    ]


def _text(message: dict, calls: list) -> Any:
    """The content as one text; as it is if it is neither that nor a list of text parts."""
    content = message.get("content")
    if content is None and calls:
        return ""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    return "".join(texts) if len(texts) == len(content) and all(isinstance(text, str) for text in texts) else content


def _call(call: Any, where: str) -> Message:
    function = call.get("function") if isinstance(call, dict) and call.get("type", "function") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise UserError(f"{where} is no call of a function", "give its function a name and arguments")
    return Message("assistant", _call_text(function.get("arguments"), f"{where}.function.arguments"), name)


def _call_text(arguments: Any, where: str) -> str:
    try:
        values = json.loads("{}" if arguments in (None, "") else arguments)
        if isinstance(values, dict):
            return f"```python\ntool_call({', '.join(f'{key}={value!r}' for key, value in values.items())})\n```"
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where} is no JSON ({error})", "send it as the model's answer had it") from error
    raise UserError(f"{where} is no JSON object", "send an object with the parameters as keys")


def _definition(tool: Any, where: str) -> dict:
    """Name, description and parameters of a tool in OpenAI's form or in ChatGLM3's, which is the function alone."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not function.get("name"):
        raise UserError(f"{where} has no name", "give it a name, a description and parameters")
    told = {key: function[key] for key in DEFINITION if function.get(key) is not None}
    wrong = [key for key, value in told.items() if not isinstance(value, DEFINITION[key])]
    if wrong:
        raise UserError(
            f"{where} has a {wrong[0]} of another kind", "name and description are texts, parameters an object"
        )
    return told
