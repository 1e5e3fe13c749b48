"""Requests as OpenAI's clients send them: the fields, their bounds, and what they mean to an engine.

A field that would change the answer and is not understood is refused; fields that only label a request are accepted.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from entrypoints.sampling import Sampling

MOST_MESSAGES = 2048
MOST_CHOICES = 8
MOST_STOPS = 16
MOST_NESTING = 32  # levels of a schema; the prompt shows tools indented, which grows with its square
MOST_SCHEMA_LETTERS = 100_000  # of one schema, or of all tools together

StopText = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


def _bounded_schema(schema: dict[str, Any]) -> dict[str, Any]:
    level, depth = [schema], 0
    while level := [
        child
        for node in level
        if isinstance(node, dict | list)
        for child in (node.values() if isinstance(node, dict) else node)
    ]:
        depth += 1
        if depth > MOST_NESTING:
            raise ValueError(f"nested deeper than {MOST_NESTING} levels")
    if len(json.dumps(schema)) > MOST_SCHEMA_LETTERS:
        raise ValueError(f"longer than {MOST_SCHEMA_LETTERS} letters")
    return schema


Schema = Annotated[dict[str, Any], AfterValidator(_bounded_schema)]


class Strict(BaseModel):
    """Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


class TextPart(BaseModel):
    """One part of a message's content; only text is understood."""

    type: Literal["text"]
    text: str


class FunctionCall(BaseModel):
    """A call that an earlier answer made; `arguments` is JSON."""

    name: str
    arguments: str = "{}"


class ToolCall(BaseModel):
    """A call with the id that its result names."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Strict):
    """One turn; `tool` and ChatGLM3's own `observation` are the same role, `developer` and `system` too."""

    role: Literal["system", "developer", "user", "assistant", "tool", "observation"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    metadata: str | None = None  # ChatGLM3: the tool that an assistant turn calls
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    # empty in the answers of OpenAI's client, which callers send back as they are
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _has_content(self) -> "ChatMessage":
        if self.content is None and not self.tool_calls:
            raise ValueError("content is null and there are no tool_calls")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"a {self.role} turn cannot have tool_calls")
        return self


class Function(BaseModel):
    """What the model is told of a tool; `parameters` is a JSON schema."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A tool on offer."""

    type: Literal["function"] = "function"
    function: Function


def _bounded_tools(tools: list[Tool]) -> list[Tool]:
    if sum(len(tool.model_dump_json()) for tool in tools) > MOST_SCHEMA_LETTERS:
        raise ValueError(f"longer than {MOST_SCHEMA_LETTERS} letters together")
    return tools


Tools = Annotated[list[Tool], Field(max_length=128), AfterValidator(_bounded_tools)]


class NamedFunction(BaseModel):
    """The name inside a `tool_choice`."""

    name: str


class NamedTool(BaseModel):
    """A `tool_choice` that names its function."""

    type: Literal["function"] = "function"
    function: NamedFunction


class JsonSchema(BaseModel):
    """The schema inside a `response_format`."""

    name: str = "answer"
    schema_: Schema = Field(default_factory=dict, alias="schema")
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(BaseModel):
    """`json_schema` needs the field of that name."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("the field json_schema is missing")
        return self

    def schema_or_none(self) -> dict | None:
        """JSON schema of the answer, {} for any object, None for free text."""
        if self.type == "text":
            return None
        return self.json_schema.schema_ if self.json_schema else {}


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool = False


class Request(Strict):
    """What chat and plain completions share; a field that is absent or null takes the default of `Sampling`."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=1, le=100_000)
    repetition_penalty: float | None = Field(None, ge=0.01, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, Any] | None = None

    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def sampling(self, **more: object) -> Sampling:
        """The parameters for an engine."""
        names = ("temperature", "top_p", "top_k", "repetition_penalty", "frequency_penalty", "presence_penalty", "seed")
        given = {name: getattr(self, name) for name in names} | {"max_new_tokens": self.max_tokens, **more}
        return Sampling(**{name: value for name, value in given.items() if value is not None})


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _asks_for_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    def chat_sampling(self) -> Sampling:
        """The parameters for an engine, with what only chat has."""
        return self.sampling(
            max_new_tokens=self.max_completion_tokens or self.max_tokens,
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            json_schema=self.response_format.schema_or_none() if self.response_format else None,
        )


class CompletionRequest(Request):
    """POST /v1/completions: text or token ids, continued as they are, without the chat format."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None


class TokenizeRequest(Strict):
    """POST /tokenize: a conversation or a plain text."""

    model: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MOST_MESSAGES)
    tools: Tools | None = None
    prompt: str | None = None

    @model_validator(mode="after")
    def _has_one(self) -> "TokenizeRequest":
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give either messages or prompt")
        return self
