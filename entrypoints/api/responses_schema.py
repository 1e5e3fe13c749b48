"""The body of POST /v1/responses.

The endpoint is stateless: what refers to a stored response, and tools that the server itself would run, are rejected by
name. A field that would not change the answer is accepted.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from entrypoints.api.openai_schema import (
    MAX_MESSAGES,
    MAX_SCHEMA_CHARACTERS,
    MAX_TOOLS,
    FunctionDefinition,
    JsonSchema,
)
from entrypoints.api.request_fields import LABELS, Integer, Number, RequestModel, Switch
from entrypoints.chat_format.openai_messages import is_empty

LOGPROBS = "message.output_text.logprobs"  # the value of `include` that asks for log probabilities
REQUIRED_FIELDS = {  # type of an item -> fields it must have
    "message": ("role", "content"),
    "function_call": ("call_id", "name"),
    "function_call_output": ("call_id", "output"),
}
ITEMS = "items are messages, function calls and their outputs; nothing is stored, so clients must set store to false"


def _rejected(reason: str) -> BeforeValidator:
    """The check of a field that must be absent or empty."""

    def check(value: Any) -> None:
        if not (is_empty(value) or value is False):
            raise PydanticCustomError("unsupported_parameter", "not supported: {reason}", {"reason": reason})

    return BeforeValidator(check)


def _one_of(types: Sequence[str], default: str, reason: str) -> BeforeValidator:
    """The check of the `type` of an object."""

    def check(value: Any) -> Any:
        kind = value.get("type", default) if isinstance(value, dict) else default
        if kind not in types:
            context = {"kind": f"{kind!r:.60}", "reason": reason}
            raise PydanticCustomError("unsupported_type", "the type {kind} is not supported: {reason}", context)
        return value

    return BeforeValidator(check)


def _check_arguments(value: str) -> str:
    try:
        is_object = isinstance(json.loads(value or "{}"), dict)
    except RecursionError:
        is_object = False
    if not is_object:
        raise ValueError("not a JSON object")
    return value


def _without_effort(value: Any) -> Any:
    """Reasoning options that ask for none are the same as their absence."""
    is_dict = isinstance(value, dict)
    return None if is_dict and all(is_empty(one) or one in ("none", "auto") for one in value.values()) else value


NothingStored = Annotated[None, _rejected("no response is stored; send the whole conversation in input")]
NoPrompts = Annotated[None, _rejected("no prompt is stored; send instructions and input")]
NoBackground = Annotated[None, _rejected("a response is generated while the client waits")]
NoCompaction = Annotated[None, _rejected("the server does not shorten a conversation")]
NoModeration = Annotated[None, _rejected("the server has no moderation model")]
NoReasoning = Annotated[
    None, _rejected("the model does not reason before it answers"), BeforeValidator(_without_effort)
]


class SentBack(RequestModel):
    """An item, or a part of one, which clients may send back as they received it."""

    labels: ClassVar[frozenset[str]] = LABELS | {"id", "status"}

    @classmethod
    def has_no_effect(cls, name: str, value: object, fields: dict[str, Any]) -> bool:
        """An earlier answer carries labels of the server and the client that handled it, whatever their names."""
        is_answer = fields.get("role") == "assistant" or fields.get("type") in ("function_call", "output_text")
        return is_answer or super().has_no_effect(name, value, fields)


class TextContent(SentBack):
    """One part of a message or of a function's output."""

    type: Literal["input_text", "output_text", "text"]
    text: str


TextPart = Annotated[TextContent, _one_of(("input_text", "output_text", "text"), "text", "content is text")]
Content = str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_MESSAGES)]


class InputItem(SentBack):
    """A message, a function call of an earlier answer, or the output of the function."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Content | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: Annotated[str, AfterValidator(_check_arguments)] | None = None
    output: Content | None = None

    @model_validator(mode="after")
    def _has_required_fields(self) -> "InputItem":
        missing = [name for name in REQUIRED_FIELDS[self.type] if getattr(self, name) is None]
        if missing:
            raise ValueError(f"an item of type {self.type} needs {' and '.join(missing)}")
        return self


Items = Annotated[
    list[Annotated[InputItem, _one_of(tuple(REQUIRED_FIELDS), "message", ITEMS)]],
    Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES),
]

Input = Annotated[
    Annotated[str, Tag("text")] | Annotated[Items, Tag("items")],
    Discriminator(lambda value: "text" if isinstance(value, str) else "items"),
]


class FunctionTool(RequestModel, FunctionDefinition):
    """A function that the model may call and the client runs."""

    type: Literal["function"]


def _check_size(tools: list[FunctionTool]) -> list[FunctionTool]:
    if sum(len(tool.model_dump_json()) for tool in tools) > MAX_SCHEMA_CHARACTERS:
        raise ValueError(f"longer than {MAX_SCHEMA_CHARACTERS} characters together")
    return tools


Functions = Annotated[
    list[Annotated[FunctionTool, _one_of(("function",), "function", "tools are functions that the client runs")]],
    Field(fail_fast=True, max_length=MAX_TOOLS),
    AfterValidator(_check_size),
]


class ChosenFunction(RequestModel):
    """A function that `tool_choice` names."""

    type: Literal["function"]
    name: str


class AllowedTools(RequestModel):
    """A `tool_choice` that allows some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenFunction], Field(fail_fast=True, min_length=1, max_length=MAX_TOOLS)]


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | ChosenFunction | AllowedTools,
    _one_of(("function", "allowed_tools"), "function", "tools are functions that the client runs"),
]


class JsonSchemaText(JsonSchema):
    """Text that matches a JSON schema."""

    type: Literal["json_schema"]


class PlainText(RequestModel):
    """Free text, or any JSON object."""

    type: Literal["text", "json_object"]


class TextOptions(RequestModel):
    """Format of the text; a verbosity other than the default would change the answer."""

    format: JsonSchemaText | PlainText = PlainText(type="text")
    verbosity: Literal["medium"] | None = None


class ResponseStreamOptions(RequestModel):
    """Events have no padding, whatever a client asks for."""

    include_obfuscation: Switch | None = None


class PromptCacheOptions(BaseModel):
    """Hints for a cache; `prewarm` asks for no answer."""

    prewarm: Literal[False] | None = None


class ResponsesRequest(RequestModel):
    """POST /v1/responses."""

    input: Input
    model: str | None = None
    instructions: str | None = None
    tools: Functions | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: Switch | None = None
    text: TextOptions | None = None
    max_output_tokens: Integer | None = Field(None, ge=1, le=1_000_000)
    temperature: Number | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: Number | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_logprobs: Integer | None = Field(None, ge=0, le=20)
    include: Annotated[list[str], Field(max_length=MAX_TOOLS)] | None = None
    stream: Switch | None = None
    stream_options: ResponseStreamOptions | None = None
    # accepted without effect
    store: Switch | None = None
    truncation: Literal["auto", "disabled"] | None = None
    max_tool_calls: Integer | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    service_tier: str | None = None
    # rejected unless they are empty
    previous_response_id: NothingStored = None
    conversation: NothingStored = None
    prompt: NoPrompts = None
    background: NoBackground = None
    background_options: NoBackground = None
    context_management: NoCompaction = None
    moderation: NoModeration = None
    reasoning: NoReasoning = None

    @property
    def logprobs(self) -> bool:
        """Whether the response has log probabilities."""
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())
