"""The tools of a request: to the model with the messages, the one that must be called, and the model's calls back."""

import json
from collections.abc import Sequence

from entrypoints import openai_turns
from entrypoints.answer import ToolCall
from entrypoints.api.openai_schema import ChatMessage, NamedTool, Tool
from entrypoints.errors import UserError
from entrypoints.prompt import Message


def to_turns(messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[Message]:
    """The conversation as `openai_turns` tells it to the model."""
    return openai_turns.to_turns([each.model_dump() for each in messages], [tool.model_dump() for tool in tools])


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
