"""Access of the chat pages to an OpenAI-compatible server: list the models, stream an answer in the background."""

import asyncio
import re
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired
from urllib.parse import urlsplit

import openai
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionChunk,
    ChatCompletionFunctionToolParam,
    ChatCompletionMessageFunctionToolCallParam,
    ChatCompletionMessageParam,
)
from openai.types.chat.chat_completion_chunk import ChoiceDeltaToolCall
from openai.types.chat.chat_completion_message_function_tool_call_param import Function
from typing_extensions import TypedDict  # pydantic cannot read the one of typing before Python 3.12

from entrypoints.errors import UserError
from entrypoints.flags import is_loopback
from entrypoints.web.request_errors import REQUEST_ERRORS, ErrorMessage, describe_error, is_too_long

CONNECT_TIMEOUT_SECONDS = 5
READ_TIMEOUT_SECONDS = 600  # prompt processing on a slow machine delays the first token
LIST_TIMEOUT_SECONDS = 15  # a page shows nothing before it has the models

ToolCall = ChatCompletionMessageFunctionToolCallParam


class Message(TypedDict):
    """A message of the conversation, in the form of the API."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]


@dataclass(frozen=True)
class ModelInfo:
    """A model or adapter of /v1/models; context length in tokens, None if the server does not report it."""

    name: str
    context_length: int | None = None
    parent: str | None = None


@dataclass(frozen=True)
class TokenCount:
    """Tokens of a text, and the context length of the model; None if the server does not report it."""

    tokens: int
    limit: int | None


@dataclass(frozen=True)
class CompletionRequest:
    """The fields of a chat completion request except its messages."""

    model: str
    max_tokens: int
    temperature: float
    top_p: float
    tools: list[ChatCompletionFunctionToolParam] | None = None


@dataclass
class StreamedAnswer:
    """An answer while it is streamed; written by one thread, read by another."""

    text: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    num_deltas: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    dropped_rounds: int = 0  # oldest rounds omitted so that the prompt fits the context window
    error: ErrorMessage | None = None
    seconds: float = 0.0
    _calls_by_index: dict[int, ToolCall] = field(default_factory=dict)

    def num_tokens(self) -> int:
        """Tokens of the answer; the number of deltas as an estimate if the stream ended before its usage arrived."""
        return self.num_deltas if self.completion_tokens is None else self.completion_tokens

    def add(self, chunk: ChatCompletionChunk) -> None:
        """Append one chunk of the stream."""
        if chunk.usage:
            self.prompt_tokens, self.completion_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        for choice in chunk.choices or ():
            self.finish_reason = choice.finish_reason or self.finish_reason
            if choice.delta and choice.delta.content:
                self.text += choice.delta.content
                self.num_deltas += 1
            for piece in (choice.delta and choice.delta.tool_calls) or ():
                self._add_call(piece)

    def _add_call(self, piece: ChoiceDeltaToolCall) -> None:
        """Append a call, or a piece of one: many servers send the arguments in pieces with the index of the call."""
        call = self._calls_by_index.get(piece.index)
        name = (piece.function and piece.function.name) or ""
        if call is None or (piece.id and piece.id != call["id"] and name):  # some servers number every call 0
            function: Function = {"name": "", "arguments": ""}
            call = {"id": piece.id or f"call_{len(self.tool_calls)}", "type": "function", "function": function}
            self._calls_by_index[piece.index] = call
            self.tool_calls.append(call)
        call["function"]["name"] = call["function"]["name"] or name
        call["function"]["arguments"] += (piece.function and piece.function.arguments) or ""


@dataclass(frozen=True)
class ApiClient:
    """An OpenAI-compatible server; `url` ends in /v1."""

    url: str
    key: str = field(default="", repr=False)

    def with_key(self, key: str) -> "ApiClient":
        """The same server with a visitor's own key; an empty key keeps the current one."""
        return ApiClient(self.url, key.strip() or self.key)

    def list_models(self) -> list[ModelInfo] | ErrorMessage:
        """The models of the server, or why they cannot be listed."""
        return asyncio.run(self._list_models())

    async def _list_models(self) -> list[ModelInfo] | ErrorMessage:
        try:
            async with self._connect() as client:
                models = (await client.models.list(timeout=LIST_TIMEOUT_SECONDS)).data
        except REQUEST_ERRORS as error:
            return describe_error(error, self.url, bool(self.key))
        return [ModelInfo(m.id, getattr(m, "max_model_len", None), getattr(m, "parent", None)) for m in models]

    def count_tokens(self, text: str, model: str) -> TokenCount | None:
        """Ask the server for the tokens of a text, by the route that glm serve and vLLM have; None without it."""
        return asyncio.run(self._count_tokens(text, model))

    async def _count_tokens(self, text: str, model: str) -> TokenCount | None:
        url = re.sub(r"/v\d+\w*$", "/tokenize", self.url)
        try:
            async with self._connect() as client:
                found = await client.post(url, cast_to=object, body={"model": model, "prompt": text})
        except REQUEST_ERRORS:
            return None
        if not isinstance(found, dict) or not isinstance(found.get("count"), int):
            return None
        return TokenCount(found["count"], found.get("max_model_len"))

    async def stream_answer(
        self, messages: Sequence[Message], request: CompletionRequest, answer: StreamedAnswer
    ) -> None:
        """Fill `answer` until it is complete; the oldest rounds are omitted if the prompt does not fit."""
        start = time.monotonic()
        remaining: Sequence[Message] | None = messages
        try:
            async with self._connect() as client:
                while remaining:
                    remaining = await self._stream_once(client, remaining, request, answer)
                    answer.dropped_rounds += bool(remaining)
        except REQUEST_ERRORS as error:
            answer.error = describe_error(error, self.url, bool(self.key))
        finally:
            answer.seconds = time.monotonic() - start

    async def _stream_once(
        self, client: AsyncOpenAI, messages: Sequence[Message], request: CompletionRequest, answer: StreamedAnswer
    ) -> list[Message] | None:
        """None after a complete stream; the messages without the oldest round if the prompt is too long."""
        start = time.monotonic()
        try:
            stream = await client.chat.completions.create(
                messages=[_as_param(message) for message in messages],
                model=request.model,
                max_tokens=request.max_tokens,
                temperature=request.temperature,
                top_p=request.top_p,
                tools=request.tools or openai.omit,
                stream=True,
                stream_options={"include_usage": True},
            )
        except openai.BadRequestError as error:
            shorter = drop_oldest_round(messages)
            if is_too_long(error) and shorter:
                return shorter
            raise
        async with stream:
            async for chunk in stream:
                answer.add(chunk)
                answer.seconds = time.monotonic() - start
        return None

    def _connect(self) -> AsyncOpenAI:
        # a proxy of the environment must not be used between a page and a server on the same machine
        is_local = is_loopback(urlsplit(self.url).hostname or "")
        timeout = openai.Timeout(READ_TIMEOUT_SECONDS, connect=CONNECT_TIMEOUT_SECONDS)
        http = DefaultAsyncHttpxClient(trust_env=not is_local, timeout=timeout)
        return AsyncOpenAI(base_url=self.url, api_key=self.key or "none", max_retries=0, http_client=http)


class AnswerTask:
    """One answer in its own thread. `stop` closes the connection at once, which also stops the model."""

    def __init__(self, api: ApiClient, messages: Sequence[Message], request: CompletionRequest) -> None:
        self.answer = StreamedAnswer()
        self.stopped = False
        self.done = threading.Event()
        self.finish_lock = threading.Lock()  # held by the thread that appends the answer to the conversation
        self.started = time.monotonic()
        self._lock = threading.Lock()
        self._cancel: Callable[[], object] | None = None
        work = self._run(api.stream_answer(messages, request, self.answer))
        threading.Thread(target=asyncio.run, args=(work,), name="answer", daemon=True).start()

    def stop(self) -> None:
        """Cancel the answer; safe from any thread, no effect after its end."""
        with self._lock:
            if not self.done.is_set():
                self.stopped = True
            if self._cancel:
                self._cancel()

    async def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task, loop = asyncio.ensure_future(work), asyncio.get_running_loop()
        with self._lock:
            self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
            if self.stopped:
                task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass
        except BaseException:
            self.answer.error = ErrorMessage("failed", {"detail": "internal error"})  # the log has the traceback
            raise
        finally:
            with self._lock:
                self._cancel = None
                self.done.set()


def drop_oldest_round(messages: Sequence[Message]) -> list[Message] | None:
    """The messages without the oldest question and its answers; None if only the last question is left."""
    questions = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if len(questions) < 2:
        return None
    return [*messages[: questions[0]], *messages[questions[1] :]]


def base_url(url: str, key: str = "") -> str:
    """The base URL of the API that a user named: with or without /v1, or the URL of an endpoint.

    Where the path does not tell, the server is asked for its models. Raises UserError if it is not an HTTP URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"the API URL {url} is not an HTTP URL", "write it as http://host:8000/v1")
    url = url.rstrip("/")
    for endpoint in ("/chat/completions", "/completions", "/models"):
        url = url.removesuffix(endpoint)
    if re.search(r"/v\d+\w*$", url):
        return url
    with_version = f"{url}/v1"
    if not urlsplit(url).path or not _has_no_models(with_version, key) or _has_no_models(url, key):
        return with_version
    return url


def _has_no_models(url: str, key: str) -> bool:
    models = ApiClient(url, key).list_models()
    return isinstance(models, ErrorMessage) and models.key == "rejected"


def _as_param(message: Message) -> ChatCompletionMessageParam:
    role, content = message["role"], message["content"]
    if role == "system":
        return {"role": "system", "content": content}
    if role == "user":
        return {"role": "user", "content": content}
    if role == "tool":
        return {"role": "tool", "content": content, "tool_call_id": message["tool_call_id"]}
    answer: ChatCompletionAssistantMessageParam = {"role": "assistant", "content": content}
    if "tool_calls" in message:
        answer["tool_calls"] = message["tool_calls"]
    return answer
