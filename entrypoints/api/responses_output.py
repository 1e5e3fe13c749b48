"""The response object of /v1/responses and its stream events, built from the same deltas as a chat completion."""

import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from entrypoints.api.errors import ApiError, ErrorReply
from entrypoints.api.responses import CompletionRun, chat_logprobs
from entrypoints.api.responses_request import own_field
from entrypoints.api.responses_schema import ResponsesRequest
from entrypoints.api.tools import to_openai
from entrypoints.chat_format.tool_calls import ToolCall
from entrypoints.engines.base import JsonSchemaError, Token

Json = dict[str, Any]
ECHOED_FIELDS = (
    "instructions", "max_output_tokens", "max_tool_calls", "metadata", "prompt_cache_key", "safety_identifier", "user"
)  # fmt: skip
FIXED_FIELDS: Json = {  # what every response of a stateless server has
    "store": False,
    "background": False,
    "previous_response_id": None,
    "truncation": "disabled",
    "service_tier": "default",
    "reasoning": {"effort": None, "summary": None},
}
PLAIN_TEXT: Json = {"format": {"type": "text"}, "verbosity": "medium"}
ERROR_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


class ResponseRun:
    """One response while it is generated: its output items so far, and the events that each delta adds."""

    def __init__(self, request: ResponsesRequest, run: CompletionRun) -> None:
        self.run = run
        self._request = request
        self._id = f"resp_{uuid.uuid4().hex}"
        self._output: list[Json] = []  # finished items
        self._message: Json | None = None  # the message whose text is being generated
        self._pending: list[Token] = []  # tokens that are not part of an event yet
        self._status = "in_progress"
        self._error: Json | None = None

    async def events(self) -> AsyncGenerator[Json, None]:
        """The events of a stream, in OpenAI's order; the last one holds the whole response."""
        yield self._lifecycle_event("created")
        yield self._lifecycle_event("in_progress")
        finish_reason = None
        async with contextlib.aclosing(self.run.deltas()) as deltas:
            async for _, delta in deltas:
                self._pending += delta.tokens
                finish_reason = delta.finish_reason or finish_reason
                for event in self._delta_events(delta.text, delta.tool_calls):
                    yield event
        self._status = "incomplete" if finish_reason == "length" else "completed"
        for event in self._last_events():
            yield event
        yield self._lifecycle_event(self._status)

    async def result(self) -> Json:
        """The complete response. Raises ApiError that names fields of this endpoint."""
        try:
            async with contextlib.aclosing(self.events()) as events:
                async for event in events:
                    last = event
        except JsonSchemaError as error:
            raise ApiError(400, str(error), own_field("response_format"), "invalid_request") from error
        response: Json = last["response"]
        return response

    def failed_event(self, reply: ErrorReply) -> Json:
        """The last event of a response that cannot be completed."""
        self._status = "failed"
        param = own_field(reply.param) if reply.param else None
        self._error = {"code": ERROR_CODES.get(reply.status, "server_error"), "message": reply.message, "param": param}
        return self._lifecycle_event("failed")

    def _delta_events(self, text: str, calls: Sequence[ToolCall]) -> Iterator[Json]:
        if text:
            if self._message is None:
                yield from self._start_message()
            yield self._text_event("delta", {"delta": text, "logprobs": self._take_logprobs()})
            self._part["text"] += text
        if calls:
            self._pending = []  # the tokens of calls are not part of a text
            yield from self._finish_message("completed")
        for call in calls:
            yield from self._call_events(call)

    def _last_events(self) -> Iterator[Json]:
        if not self._output and self._message is None:  # an empty answer is an empty message
            yield from self._start_message()
        yield from self._finish_message(self._status)

    def _start_message(self) -> Iterator[Json]:
        self._message = {
            "id": f"msg_{uuid.uuid4().hex}", "type": "message", "status": "in_progress", "role": "assistant",
            "content": [],
        }  # fmt: skip
        yield self._item_event("added", self._message)
        self._message["content"] = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
        yield self._text_event("part_added", {"part": dict(self._part)})

    def _finish_message(self, status: str) -> Iterator[Json]:
        if self._message is None:
            return
        rest = self._take_logprobs()
        if rest:  # tokens without text, at the end
            yield self._text_event("delta", {"delta": "", "logprobs": rest})
        yield self._text_event("done", {"text": self._part["text"], "logprobs": self._part["logprobs"]})
        yield self._text_event("part_done", {"part": self._part})
        self._message["status"] = status
        yield self._item_event("done", self._message)
        self._output.append(self._message)
        self._message = None

    def _call_events(self, call: ToolCall) -> Iterator[Json]:
        call_id = f"call_{uuid.uuid4().hex[:24]}"
        function = to_openai(call, call_id)["function"]
        item = {
            "id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "status": "in_progress", "call_id": call_id,
            "name": function["name"], "arguments": "",
        }  # fmt: skip
        yield self._item_event("added", item)
        position = {"item_id": item["id"], "output_index": len(self._output)}
        arguments = function["arguments"]
        yield {"type": "response.function_call_arguments.delta", **position, "delta": arguments}
        yield {
            "type": "response.function_call_arguments.done", **position, "name": item["name"], "arguments": arguments
        }  # fmt: skip
        item = {**item, "status": "completed", "arguments": arguments}
        yield self._item_event("done", item)
        self._output.append(item)

    @property
    def _part(self) -> Json:
        """The content of the message that is being generated."""
        assert self._message is not None
        part: Json = self._message["content"][0]
        return part

    def _take_logprobs(self) -> list[Json]:
        """Log probabilities of the tokens since the last event, which become part of the message."""
        tokens, self._pending = self._pending, []
        entries: list[Json] = chat_logprobs(self.run, tokens)["content"] if self._request.logprobs else []
        self._part["logprobs"] += entries
        return entries

    def _item_event(self, kind: str, item: Json) -> Json:
        return {"type": f"response.output_item.{kind}", "output_index": len(self._output), "item": dict(item)}

    def _text_event(self, kind: str, fields: Json) -> Json:
        assert self._message is not None
        name = {"part_added": "content_part.added", "part_done": "content_part.done"}.get(kind, f"output_text.{kind}")
        position = {"item_id": self._message["id"], "output_index": len(self._output), "content_index": 0}
        return {"type": f"response.{name}", **position, **fields}

    def _lifecycle_event(self, kind: str) -> Json:
        return {"type": f"response.{kind}", "response": self._snapshot()}

    def _snapshot(self) -> Json:
        completed_at = int(time.time()) if self._status == "completed" else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self.run.created,
            "completed_at": completed_at,
            "status": self._status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "model": self.run.model,
            "output": list(self._output),
            "usage": None if self._status == "in_progress" else self._usage(),
            **self._parameters(),
        }

    def _parameters(self) -> Json:
        """The parameters of the request as they took effect."""
        request, sampling = self._request, self.run.tasks[0].sampling
        choice = request.tool_choice or "auto"
        return {
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [{"type": "function", **tool.model_dump(exclude={"type"})} for tool in request.tools or ()],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_logprobs": request.top_logprobs or 0,
            "text": request.text.model_dump(by_alias=True, exclude_none=True) if request.text else PLAIN_TEXT,
            **{name: getattr(request, name) for name in ECHOED_FIELDS},
            **FIXED_FIELDS,
        }

    def _usage(self) -> Json:
        usage = self.run.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }


class NamedEvents:
    """The format of a stream of responses: named and numbered events, the last of which ends the stream."""

    end = ""

    def __init__(self, run: ResponseRun) -> None:
        self._run = run
        self._count = 0

    def event(self, event: Json) -> str:
        """One event."""
        numbered = {"type": event["type"], "sequence_number": self._count, **event}
        self._count += 1
        return f"event: {event['type']}\ndata: {json.dumps(numbered)}\n\n"

    def error(self, reply: ErrorReply) -> str:
        """The event of a response that failed."""
        return self.event(self._run.failed_event(reply))
