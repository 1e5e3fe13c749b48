"""What the chat pages show of a conversation: bubbles with their parts, and what can be done at each of them.

Both pages draw the same bubbles; only how a part becomes HTML or a widget differs.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from entrypoints.file_writing import indented_json
from entrypoints.web.client import Message, ModelInfo, StreamedAnswer
from entrypoints.web.conversation import Node, Usage, is_empty
from entrypoints.web.i18n import translate
from entrypoints.web.request_errors import ErrorMessage
from entrypoints.web.session import ChatSession, RunningAnswer
from entrypoints.web.tool_use import is_error

Kind = Literal["typed", "markdown", "document", "call", "result", "failed_result", "note", "error"]


@dataclass(frozen=True)
class Part:
    """A piece of a bubble: `typed` is shown as it is, `call` and `result` are cards with a title."""

    kind: Kind
    text: str
    title: str = ""


@dataclass(frozen=True)
class Bubble:
    """One message; `node` is None while it is generated, `raw` is the text to copy, `version` is (number, count)."""

    role: Literal["user", "assistant"]
    parts: tuple[Part, ...]
    node: Node | None = None
    raw: str = ""
    actions: tuple[str, ...] = ()
    version: tuple[int, int] = (1, 1)
    caption: str = ""


def bubbles(session: ChatSession, language: str, side: int = 0, feedback: bool = False) -> Iterator[Bubble]:
    """The messages of one side, with the answer in progress last; `feedback`: answers can be rated."""
    running = session.running.get(side)
    path = session.conversation.path(side)
    for node in path:
        is_continued = running is not None and running.continued == node.id
        added = running.task.answer.text if running and is_continued else ""
        is_last = node is path[-1]
        actions = () if session.running else tuple(_actions(node, is_last, feedback))
        versions = session.conversation.versions(node)
        yield Bubble(
            _role(node.message, node.model),
            tuple(_parts(node, added, language)),
            node,
            raw_text(node.message),
            actions,
            (versions.index(node) + 1, len(versions)),
            _caption(node, len(session.conversation.leaves) > 1, language),
        )
    if running and running.continued is None:
        yield Bubble("assistant", tuple(_parts_in_progress(running, language)))


def _role(message: Message, model: str) -> Literal["user", "assistant"]:
    return "user" if message["role"] == "user" or (message["role"] == "tool" and model != "demo") else "assistant"


def _parts(node: Node, added: str, language: str) -> Iterator[Part]:
    message = node.message
    text = message["content"] + added
    if message["role"] == "tool":
        failed = is_error(text)
        title = translate(language, "tool_error" if failed else "tool_result")
        yield Part("failed_result" if failed else "result", indent_json(text), title)
    elif message["role"] == "user":
        if node.attachment:
            yield Part("document", node.attachment.text, node.attachment.name)
        yield Part("typed", node.text())
    elif text.strip():
        yield Part("markdown", text)
    yield from _call_parts(message, language)
    if node.error:
        yield Part("error", error_text(node.error, language))
    elif is_empty(node):
        yield Part("note", translate(language, "empty_answer"))
    if node.correction is not None:
        yield Part("note", translate(language, "corrected"))
        yield Part("markdown", node.correction)


def _call_parts(message: Message, language: str) -> Iterator[Part]:
    for call in message.get("tool_calls", ()):
        title = translate(language, "tool_call", name=call["function"]["name"])
        yield Part("call", indent_json(call["function"]["arguments"]), title)


def raw_text(message: Message) -> str:
    """The text to copy: what was written, or the arguments of the calls."""
    calls = message.get("tool_calls", ())
    return message["content"] or "\n".join(indent_json(call["function"]["arguments"]) for call in calls)


def _parts_in_progress(running: RunningAnswer, language: str) -> Iterator[Part]:
    answer = running.task.answer
    if answer.text:
        yield Part("markdown", answer.text)
    elif not answer.tool_calls:
        yield Part("note", waiting_text(running, language))
    yield from _call_parts({"role": "assistant", "content": "", "tool_calls": list(answer.tool_calls)}, language)


def progress(running: RunningAnswer) -> tuple[int, int]:
    """Changes whenever there is something to draw: a piece of text, or another second of waiting."""
    answer = running.task.answer
    is_waiting = not answer.num_deltas and not answer.tool_calls
    return answer.num_deltas + len(answer.tool_calls), _seconds(running) if is_waiting else 0


def waiting_text(running: RunningAnswer, language: str) -> str:
    """That the model has not answered yet, with the seconds since the request."""
    return translate(language, "waiting", seconds=_seconds(running))


def _seconds(running: RunningAnswer) -> int:
    """Since the request."""
    return int(time.monotonic() - running.task.started)


def _actions(node: Node, is_last: bool, feedback: bool) -> Iterator[str]:
    """Names of what can be done at a message; each is a key of i18n.TEXTS."""
    message = node.message
    yield "copy"
    if message["role"] != "assistant":
        if node.error:
            yield "retry"
        yield "edit"
    else:
        yield "regenerate"
        if is_last and not message.get("tool_calls") and not is_empty(node) and node.finish_reason != "stop":
            yield "continue"
        yield "branch"
        if feedback and not is_empty(node):
            yield from ("like", "dislike", "correct")
    yield "delete"


def _caption(node: Node, with_model: bool, language: str) -> str:
    parts = [node.model] if with_model and node.message["role"] == "assistant" else []
    if node.usage and with_model:
        parts.append(usage_text(node.usage, language))
    return " · ".join(parts)


def usage_text(usage: Usage, language: str) -> str:
    """Tokens, time and speed of an answer."""
    values = {
        "answer": usage.answer_tokens,
        "prompt": usage.prompt_tokens,
        "seconds": f"{usage.seconds:.1f}",
        "rate": f"{usage.answer_tokens / usage.seconds:.1f}" if usage.seconds else "–",
    }
    return translate(language, "stats_stopped" if usage.is_estimate else "stats", **values)


def status_line(session: ChatSession, language: str) -> str:
    """One line about the last answer: tokens, speed, whether it is complete."""
    answer = session.last_answer
    if answer is None or (not answer.num_deltas and not answer.tool_calls):
        return ""
    parts = [usage_text(_usage(answer), language)]
    if answer.finish_reason == "length":
        parts.append(translate(language, "truncated"))
    if answer.dropped_rounds:
        parts.append(translate(language, "dropped", count=answer.dropped_rounds))
    return " · ".join(parts)


def _usage(answer: StreamedAnswer) -> Usage:
    return Usage(answer.num_tokens(), answer.prompt_tokens, answer.seconds, answer.completion_tokens is None)


def model_label(model: ModelInfo, language: str) -> str:
    """Its name, and the base model of an adapter."""
    if not model.parent:
        return model.name
    return translate(language, "adapter_of", name=model.name, parent=model.parent)


def input_hint(session: ChatSession, language: str) -> str:
    """Placeholder of the input field: a question, or the result of the pending tool call."""
    pending = session.conversation.pending_tool_calls()
    if pending:
        return translate(language, "tool_result_hint", name=pending[0]["function"]["name"])
    return translate(language, "question")


def error_text(error: ErrorMessage, language: str) -> str:
    """The error in the language of the page."""
    return translate(language, error.key, **error.values)


def indent_json(text: str) -> str:
    """The JSON text indented; any other text unchanged."""
    try:
        return indented_json(json.loads(text))
    except (ValueError, RecursionError):
        return text
