"""From the body of POST /v1/responses to the chat request with the same prompt and parameters."""

import itertools
import re
from collections.abc import Iterator
from typing import Literal

from pydantic import ValidationError

from entrypoints.api.errors import ApiError
from entrypoints.api.generation import GenerationTask
from entrypoints.api.openai_schema import (
    ChatMessage,
    ChatRequest,
    FunctionCall,
    FunctionDefinition,
    FunctionName,
    NamedToolChoice,
    ResponseFormat,
    Tool,
    ToolCall,
)
from entrypoints.api.requests import build_chat_tasks
from entrypoints.api.responses_schema import (
    AllowedTools,
    ChosenFunction,
    InputItem,
    JsonSchemaText,
    ResponsesRequest,
    TextContent,
)
from entrypoints.api.state import ServerState

MESSAGE_PATH = re.compile(r"\bmessages\.[\w.]*\w")  # its index is not that of an item of the input
FIELDS = {  # field of a chat request that an error names -> field of this endpoint
    "messages": "input",
    "response_format": "text.format",
    "logprobs": "top_logprobs",
}


def to_chat_request(body: ResponsesRequest) -> ChatRequest:
    """The chat request of a body. Raises ApiError that names the field at fault."""
    _check_call_ids(body.input)
    tools, choice = _tools_and_choice(body)
    try:
        return ChatRequest.model_validate(
            {
                "messages": list(_messages(body)),
                "model": body.model,
                "tools": tools or None,
                "tool_choice": choice,
                "parallel_tool_calls": body.parallel_tool_calls,
                "response_format": _response_format(body),
                "max_completion_tokens": body.max_output_tokens,
                "temperature": body.temperature,
                "top_p": body.top_p,
                "logprobs": body.logprobs or None,
                "top_logprobs": body.top_logprobs if body.logprobs else None,
            }
        )
    except ValidationError as error:  # what only the whole conversation shows, such as its length
        problem = error.errors(include_url=False, include_input=False)[0]
        param = own_field(str(problem["loc"][0])) if problem["loc"] else "input"
        raise ApiError(400, f"{param}: {problem['msg']}", param, problem["type"]) from error


def build_response_tasks(state: ServerState, body: ResponsesRequest) -> tuple[ChatRequest, list[GenerationTask]]:
    """The chat request of a body, and its one task. Raises ApiError that names the field at fault."""
    chat = to_chat_request(body)
    try:
        return chat, build_chat_tasks(state, chat)
    except ApiError as error:
        param = own_field(error.param) if error.param else None
        message = MESSAGE_PATH.sub("input", error.detail).replace("response_format", "text.format")
        raise ApiError(error.status_code, message, param, error.code) from error


def own_field(param: str) -> str:
    """The field of this endpoint that became this field of a chat request."""
    name, dot, rest = param.partition(".")
    return FIELDS[name] if name in FIELDS else name + dot + rest


def _check_call_ids(items: str | list[InputItem]) -> None:
    """Each output belongs to a function call before it."""
    known = set()
    for index, item in enumerate(() if isinstance(items, str) else items):
        if item.type == "function_call":
            known.add(item.call_id)
        elif item.type == "function_call_output" and item.call_id not in known:
            param = f"input.{index}.call_id"
            raise ApiError(400, f"{param}: {item.call_id!r:.80} names no function_call before it", param)


def _messages(body: ResponsesRequest) -> Iterator[ChatMessage]:
    if body.instructions:
        yield ChatMessage(role="system", content=body.instructions)
    if isinstance(body.input, str):
        yield ChatMessage(role="user", content=body.input)
        return
    for is_answer, items in itertools.groupby(body.input, _is_answer):
        if is_answer:
            yield from _answers(items)
        else:
            yield from map(_question, items)


def _is_answer(item: InputItem) -> bool:
    """Is this a part of the model's answer, its text or a function call?"""
    return item.type == "function_call" or item.role == "assistant"


def _answers(items: Iterator[InputItem]) -> Iterator[ChatMessage]:
    """Adjacent parts of answers as messages: a text and the calls that follow it are one message."""
    text: str | None = None
    calls: list[ToolCall] = []
    for item in items:
        if item.type == "function_call":
            call = FunctionCall(name=item.name or "", arguments=item.arguments)
            calls.append(ToolCall(id=item.call_id or "", function=call))
            continue
        if text is not None or calls:
            yield ChatMessage(role="assistant", content=text, tool_calls=calls or None)
        text, calls = _text(item.content), []
    yield ChatMessage(role="assistant", content=text, tool_calls=calls or None)


def _question(item: InputItem) -> ChatMessage:
    """A message of another role, or the output of a function."""
    if item.type == "function_call_output":
        return ChatMessage(role="tool", content=_text(item.output), tool_call_id=item.call_id)
    return ChatMessage(role=item.role or "user", content=_text(item.content))


def _text(content: str | list[TextContent] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


def _tools_and_choice(
    body: ResponsesRequest,
) -> tuple[list[Tool], Literal["none", "auto", "required"] | NamedToolChoice | None]:
    tools = [Tool(function=FunctionDefinition(**tool.model_dump(exclude={"type"}))) for tool in body.tools or ()]
    choice = body.tool_choice
    if isinstance(choice, AllowedTools):
        names = {tool.function.name for tool in tools}
        allowed = {tool.name for tool in choice.tools}
        if unknown := sorted(allowed - names):
            raise ApiError(400, f"tool_choice allows {unknown[0]!r}, which is not in tools", "tool_choice")
        return [tool for tool in tools if tool.function.name in allowed], choice.mode
    if isinstance(choice, ChosenFunction):
        return tools, NamedToolChoice(function=FunctionName(name=choice.name))
    return tools, choice


def _response_format(body: ResponsesRequest) -> ResponseFormat | None:
    format_ = body.text.format if body.text else None
    if isinstance(format_, JsonSchemaText):
        return ResponseFormat(type="json_schema", json_schema=format_)
    return ResponseFormat(type=format_.type) if format_ else None
