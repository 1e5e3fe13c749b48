"""The model's answer: ids to whole characters, text to content or a tool call. Nothing a model wrote makes it raise."""

import ast
import codecs
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

# a fence ends at the beginning of a line or at the end of all: an argument may hold the same letters
CODE = re.compile(r"```[a-zA-Z]*\n(.*?)(?:\n```|(?:```\s*)?\Z)", re.DOTALL)


class PieceCodec(Protocol):
    """What reading needs of a tokenizer."""

    def piece(self, id_: int) -> bytes:
        """Bytes of one id; empty for ids without text, negative and undefined ones too."""

    def control(self, name: str) -> int:
        """Id of one control token."""


@dataclass(frozen=True)
class ToolCall:
    """A call the model asked for; `arguments` hold literals that JSON has too, `source` the text the model wrote."""

    name: str
    arguments: dict
    source: str = ""


@dataclass
class Answer:
    """What the model said: `content` is text for the user, `tool_calls` what it wants done."""

    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)


class TextStream:
    """Bytes of ids to text, whole characters only: a character that spans ids appears with its last one."""

    def __init__(self, codec: PieceCodec, continues: bool = False) -> None:
        self._codec = codec
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._fresh = not continues  # the first blank of a new text is SentencePiece's dummy prefix

    def feed(self, id_: int) -> str:
        """Text that became whole with this id, possibly empty."""
        return self._without_prefix(self._utf8.decode(self._codec.piece(id_)))

    def finish(self) -> str:
        """What an unfinished character leaves: one replacement character, or nothing."""
        return self._without_prefix(self._utf8.decode(b"", final=True))

    def _without_prefix(self, text: str) -> str:
        if self._fresh and text:
            self._fresh = False
            return text.removeprefix(" ")
        return text


def decode(ids: Iterable[int], codec: PieceCodec) -> str:
    """Text of ids; ids without text (padding, -100, control, undefined rows) count as nothing."""
    stream = TextStream(codec)
    return "".join([*(stream.feed(id_) for id_ in ids), stream.finish()])


class AnswerReader:
    """Reads an answer id by id: `feed` and `finish` return text for the user, `answer` is the whole at any time.

    The text shown in pieces always equals the text of `answer.content`. With `tools` (names) offered, a segment
    that may be a call is held back until it is known to be one or not.
    """

    def __init__(self, codec: PieceCodec, tools: Iterable[str] = ()) -> None:
        self._codec = codec
        self._tools = frozenset(tools)
        self._next_segment = codec.control("<|assistant|>")
        self.answer = Answer()
        self._open()

    def feed(self, id_: int) -> str:
        """New text for the user after this id, possibly empty."""
        if id_ == self._next_segment:
            shown = self.finish()
            self._open()
            return shown
        return self._take(self._stream.feed(id_))

    def finish(self) -> str:
        """End the segment: read a held-back call, or show the held-back text."""
        shown = self._take(self._stream.finish())
        held, self._held = self._held, ""
        if self._showing:
            return shown
        metadata, content = split_answer(held, self._tools)
        call = parse_tool_call(metadata, content) if metadata else None
        if call:
            self.answer.tool_calls.append(call)
            return shown
        return shown + self._show(content if not metadata else held)

    def _open(self) -> None:
        self._stream = TextStream(self._codec)
        self._held = ""
        self._showing = False

    def _take(self, text: str) -> str:
        if self._showing:
            return self._show(text)
        self._held += text
        if self._undecided():
            return ""
        self._showing = True
        held, self._held = self._held, ""
        return self._show(split_answer(held, self._tools)[1])

    def _undecided(self) -> bool:
        """Could what was read so far still be a header or a call?"""
        head, newline, body = self._held.partition("\n")
        head = head.strip()
        if not head or not self._tools:
            return not head and not body  # the blank after an empty header is the body's dummy prefix
        if not newline:
            return any(name.startswith(head) for name in self._tools)
        return head in self._tools and _may_be_code(body)

    def _show(self, text: str) -> str:
        self.answer.content += text
        return text


def read_answer(ids: Iterable[int], codec: PieceCodec, tools: Iterable[str] = ()) -> Answer:
    """The whole answer at once; the same text that a stream of the same ids shows."""
    reader = AnswerReader(codec, tools)
    for id_ in ids:
        reader.feed(id_)
    reader.finish()
    return reader.answer


def split_answer(text: str, tools: Iterable[str] = ()) -> tuple[str, str]:
    """(metadata, content) of one segment; total.

    The model writes `metadata`, a newline and the content. A first line counts as metadata only if it is empty or
    the name of an offered tool: tuned models often leave the header out, and then the whole text is content.
    """
    head, newline, body = text.partition("\n")
    if newline and not head.strip():
        return "", body.removeprefix(" ")
    if newline and head.strip() in frozenset(tools) and _may_be_code(body):
        return head.strip(), body.removeprefix(" ")
    return "", text


def parse_tool_call(name: str, body: str) -> ToolCall | None:
    """Read `tool_call(key=literal, ...)` inside a code fence; None if it is anything else. Nothing is evaluated."""
    code = CODE.search(body)
    try:
        call = ast.parse((code.group(1) if code else body).strip(), mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "tool_call"):
            return None
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            return None
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()  # as JSON the call is handed on
        return ToolCall(name, arguments, body)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None


def _may_be_code(body: str) -> bool:
    start = body.lstrip(" ")
    return start.startswith("```") or "```".startswith(start)
