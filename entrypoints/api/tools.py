"""OpenAI's messages and tools to ChatGLM3's own turns, and ChatGLM3's tool calls back.

ChatGLM3 is told of tools in the system turn, calls one in an assistant turn whose metadata is the tool's name and whose
body is a code block `tool_call(key=literal)`, and reads the result in an observation turn.
"""

import json
from collections.abc import Sequence

from entrypoints.answer import ToolCall
from entrypoints.api.openai_schema import ChatMessage, NamedTool, Tool
from entrypoints.errors import UserError
from entrypoints.prompt import TOOLS_INTRODUCTION, Message

ROLES = {"developer": "system", "tool": "observation"}


def to_turns(messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[Message]:
    """The conversation in ChatGLM3's roles; the tools join the caller's own first system turn, or make one.

    Raises UserError naming a tool call whose arguments are no JSON object.
    """
    turns = [turn for index, message in enumerate(messages) for turn in _turns(message, index)]
    if not tools:
        return turns
    offered = tuple(tool.function.model_dump(exclude_none=True, exclude={"strict"}) for tool in tools)
    if turns and turns[0].role == "system":
        return [Message("system", turns[0].content, tools=offered), *turns[1:]]
    return [Message("system", TOOLS_INTRODUCTION, tools=offered), *turns]


def forced_tool(choice: object, tools: Sequence[Tool]) -> str | None:
    """Name of the tool that must be called, if any.

    Raises UserError when the choice names none of the tools, or leaves more than one.
    """
    names = [tool.function.name for tool in tools]
    if isinstance(choice, NamedTool):
        if choice.function.name not in names:
            raise UserError(
                f"tool_choice names {choice.function.name!r}, which is none of the tools", "name one of them"
            )
        return choice.function.name
    if choice == "required":
        if len(names) != 1:
            raise UserError(f"tool_choice 'required' with {len(names)} tools", "name the function to call")
        return names[0]
    return None


def call_opening(name: str) -> tuple[str, str]:
    """Header and beginning of the body with which the model starts a call of this tool."""
    return f"{name}\n", "```python\ntool_call("


def to_openai(call: ToolCall, id_: str) -> dict:
    """One entry of `tool_calls`."""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": id_, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _turns(message: ChatMessage, index: int) -> list[Message]:
    role = ROLES.get(message.role, message.role)
    if role != "assistant":
        return [Message(role, message.text())]
    spoken = [Message("assistant", message.text(), message.metadata or "")] if message.text() else []
    calls = []
    for number, call in enumerate(message.tool_calls or ()):
        where = f"messages.{index}.tool_calls.{number}.function.arguments"
        calls.append(Message("assistant", _call_text(call.function.arguments, where), call.function.name))
    return spoken + calls or [Message("assistant", "")]


def _call_text(arguments: str, where: str) -> str:
    try:
        values = json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON ({error})", "send it as the model's answer had it") from error
    if not isinstance(values, dict):
        raise UserError(f"{where} is no JSON object", "send an object with the parameters as keys")
    return f"```python\ntool_call({', '.join(f'{key}={value!r}' for key, value in values.items())})\n```"
