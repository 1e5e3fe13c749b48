"""Request bodies of the OpenAI API: fields, bounds, and their mapping to `Sampling`. Unknown fields: request_fields."""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Discriminator, Field, Strict, Tag, model_validator

from entrypoints.api.request_fields import MAX_FIELDS, Integer, Number, RequestModel, Switch
from entrypoints.chat_format.openai_messages import IGNORED_FIELDS
from entrypoints.chat_format.sampling import Sampling

MAX_MESSAGES = 2048
MAX_N = 8
MAX_STOP_STRINGS = 16
MAX_TOOLS = 128
MAX_PROMPT_TOKENS = 200_000  # above the context length of every model of the family
MAX_SCHEMA_DEPTH = 32  # the prompt contains tools as indented JSON, whose size grows with the square of the depth
MAX_SCHEMA_CHARACTERS = 100_000  # of one schema, or of all tools together


def _without_empty(stop: object) -> object:
    """Clients with an empty form field send "" or [""], which stops nothing."""
    if isinstance(stop, list) and len(stop) <= MAX_STOP_STRINGS:
        return [one for one in stop if one != ""]
    return None if stop == "" else stop


StopString = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Strict(), Field(ge=0, le=2**31 - 1)]
# fail_fast: a list of all errors would take 1000 times the memory of the body
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_PROMPT_TOKENS)]


def prompt_kind(prompt: object) -> str | None:
    """The member of `Prompt` that a value is validated as, by its first item."""
    if isinstance(prompt, list):
        first = prompt[0] if prompt else ""
        return "texts" if isinstance(first, str) else "id lists" if isinstance(first, list) else "ids"
    return "text" if isinstance(prompt, str) else None


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(fail_fast=True, max_length=MAX_FIELDS), Tag("texts")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[list[TokenIds], Field(fail_fast=True, max_length=MAX_FIELDS), Tag("id lists")],
    Discriminator(
        prompt_kind,
        custom_error_type="prompt_type",
        custom_error_message="must be a text, token ids or a list of either",
    ),
]


def _check_schema_size(schema: dict[str, Any]) -> dict[str, Any]:
    level: list[Any] = [schema]
    depth = 0
    while level := [
        child
        for node in level
        if isinstance(node, dict | list)
        for child in (node.values() if isinstance(node, dict) else node)
    ]:
        depth += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise ValueError(f"nested deeper than {MAX_SCHEMA_DEPTH} levels")
    if len(json.dumps(schema)) > MAX_SCHEMA_CHARACTERS:
        raise ValueError(f"longer than {MAX_SCHEMA_CHARACTERS} characters")
    return schema


Schema = Annotated[dict[str, Any], AfterValidator(_check_schema_size)]


class TextPart(BaseModel):
    """One part of a message's content; only text is supported."""

    type: Literal["text"]
    text: str


class FunctionCall(BaseModel):
    """Function and arguments of a tool call; `arguments` is JSON."""

    name: str
    arguments: str | None = None


class ToolCall(BaseModel):
    """A tool call of an earlier answer; its result refers to `id`."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(RequestModel):
    """One message. `observation` is ChatGLM3's name for the role `tool`; `developer` is the same as `system`."""

    labels: ClassVar[frozenset[str]] = frozenset(IGNORED_FIELDS)

    role: Literal["system", "developer", "user", "assistant", "tool", "observation"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_MESSAGES)] | None = None
    metadata: str | None = None  # ChatGLM3: name of the tool that an assistant message calls
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None

    @classmethod
    def has_no_effect(cls, name: str, value: object, fields: dict[str, Any]) -> bool:
        """An earlier answer carries labels of the server that gave it, whatever their names; these two hold content."""
        is_label = fields.get("role") == "assistant" and name not in ("audio", "function_call")
        return is_label or super().has_no_effect(name, value, fields)

    @model_validator(mode="after")
    def _has_content(self) -> "ChatMessage":
        if self.content is None and self.role == "user":
            raise ValueError("the content of a user message is null")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"a message with role {self.role} cannot have tool_calls")
        return self


Messages = Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


class FunctionDefinition(BaseModel):
    """Definition of a function; `parameters` is a JSON schema."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")
    description: str | None = None
    parameters: Schema | None = None
    strict: Switch | None = None


class Tool(BaseModel):
    """A tool that the model may call."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


def _check_tools_size(tools: list[Tool]) -> list[Tool]:
    if sum(len(tool.model_dump_json()) for tool in tools) > MAX_SCHEMA_CHARACTERS:
        raise ValueError(f"longer than {MAX_SCHEMA_CHARACTERS} characters together")
    return tools


Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS), AfterValidator(_check_tools_size)]


class FunctionName(BaseModel):
    """The function of a `tool_choice`."""

    name: str


class NamedToolChoice(BaseModel):
    """A `tool_choice` that names a function."""

    type: Literal["function"] = "function"
    function: FunctionName


class JsonSchema(RequestModel):
    """The schema of a `response_format`."""

    name: str = "answer"
    schema_: Schema = Field(default_factory=dict, alias="schema")
    strict: Switch | None = None
    description: str | None = None


class ResponseFormat(RequestModel):
    """Format of the answer; the type `json_schema` requires the field of the same name."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("the field json_schema is missing")
        return self

    def schema_or_none(self) -> dict[str, Any] | None:
        """JSON schema of the answer; {} for any JSON object, None for free text."""
        if self.type == "text":
            return None
        return self.json_schema.schema_ if self.json_schema else {}


class StreamOptions(RequestModel):
    """Options of a streamed response."""

    labels: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})

    include_usage: Switch | None = None


def _top_k(value: object) -> object:
    return None if type(value) is int and value in (0, -1) else value  # both mean "no limit" elsewhere


class GenerationRequest(RequestModel):
    """Fields that chat and text completions share; an absent or null field takes the default of `Sampling`."""

    model: str | None = None
    max_tokens: Integer | None = Field(None, ge=1, le=1_000_000)
    temperature: Number | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: Number | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_k: Annotated[Integer | None, BeforeValidator(_top_k)] = Field(None, ge=1, le=100_000)
    repetition_penalty: Number | None = Field(None, ge=0.01, le=2, allow_inf_nan=False)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    presence_penalty: Number | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    seed: Integer | None = Field(None, ge=-(2**63), le=2**63 - 1)
    n: Integer | None = Field(None, ge=1, le=MAX_N)
    stop: Annotated[
        StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None,
        BeforeValidator(_without_empty),
    ] = None
    stream: Switch | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, Any] | None = None

    def stop_strings(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def _sampling(
        self, max_tokens: Integer | None, top_logprobs: Integer | None, json_schema: dict[str, Any] | None = None
    ) -> Sampling:
        given: dict[str, Any] = {
            "max_new_tokens": max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "seed": self.seed,
            "top_logprobs": top_logprobs,
            "json_schema": json_schema,
        }
        return Sampling(**{name: value for name, value in given.items() if value is not None})


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Integer | None = Field(None, ge=1, le=1_000_000)
    logprobs: Switch | None = None
    top_logprobs: Integer | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required", "any"] | NamedToolChoice | None = None
    parallel_tool_calls: Switch | None = None
    store: Switch | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs requires logprobs: true")
        return self

    def sampling(self) -> Sampling:
        """The sampling parameters for an engine."""
        return self._sampling(
            self.max_completion_tokens or self.max_tokens,
            (self.top_logprobs or 0) if self.logprobs else None,
            self.response_format.schema_or_none() if self.response_format else None,
        )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions: text or token ids, continued without the chat format."""

    prompt: Prompt
    max_tokens: Integer | None = Field(None, ge=0, le=1_000_000)
    logprobs: Integer | None = Field(None, ge=0, le=20)
    echo: Switch | None = None

    @model_validator(mode="after")
    def _check_max_tokens(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 requires echo: true")
        return self

    def sampling(self) -> Sampling:
        """The sampling parameters for an engine."""
        return self._sampling(self.max_tokens or None, self.logprobs)


class TokenizeRequest(RequestModel):
    """POST /tokenize: a conversation or a text."""

    model: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    prompt: str | None = None

    @model_validator(mode="after")
    def _has_one_input(self) -> "TokenizeRequest":
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("send either messages or prompt")
        return self
