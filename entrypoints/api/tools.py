"""Tools of a chat request: definitions into the prompt, `tool_choice`, and the model's calls into OpenAI's format."""

import json
from collections.abc import Sequence
from typing import Any

from entrypoints.api.openai_schema import ChatMessage, NamedToolChoice, Tool
from entrypoints.chat_format.openai_messages import from_openai_messages
from entrypoints.chat_format.prompt import Message
from entrypoints.chat_format.tool_calls import ToolCall
from entrypoints.chat_format.tool_grammar import tool_call_grammar
from entrypoints.errors import UserError
from entrypoints.families import CHATGLM3, Family


def to_prompt_messages(messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[Message]:
    """The conversation in ChatGLM3's roles, with the tools in its system message.

    Raises UserError for a message that `from_openai_messages` rejects.
    """
    return from_openai_messages([each.model_dump() for each in messages], [tool.model_dump() for tool in tools])


def required_call_grammar(
    choice: str | NamedToolChoice | None, tools: Sequence[Tool], family: Family = CHATGLM3
) -> str | None:
    """The grammar of the calls of which the model must write one; None if it may choose.

    Raises UserError when `choice` names an unknown tool, or requires a call without any tool.
    """
    parameters = {tool.function.name: tool.function.parameters for tool in tools}
    if isinstance(choice, NamedToolChoice):
        name = choice.function.name
        if name not in parameters:
            raise UserError(f"tool_choice names {name!r}, which is not in tools", "name one of the tools")
        return tool_call_grammar({name: parameters[name]}, family)
    if choice not in ("required", "any"):
        return None
    if not parameters:
        raise UserError(f"tool_choice {choice!r} requires a call, and the request has no tools", "add tools")
    return tool_call_grammar(parameters, family)


def to_openai(call: ToolCall, id_: str) -> dict[str, Any]:
    """One entry of `tool_calls`."""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": id_, "type": "function", "function": {"name": call.name, "arguments": arguments}}
