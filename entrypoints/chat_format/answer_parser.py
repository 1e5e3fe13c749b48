"""The model's answer: token ids to whole characters, text to content or a tool call. Model output never raises."""

import codecs
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from entrypoints.chat_format.tool_calls import ToolCall, ToolFormat, tool_format
from entrypoints.families import CHATGLM3, ROLE_TAGS, Family


class TokenDecoder(Protocol):
    """The part of a tokenizer that the parser uses."""

    @property
    def family(self) -> Family:
        """The family whose answers are parsed."""

    def token_bytes(self, id_: int) -> bytes:
        """Bytes of one id; empty for ids without text, including negative and undefined ids."""

    def special_token_id(self, name: str) -> int:
        """Id of one special token."""


@dataclass
class Answer:
    """A parsed answer: `content` is text for the user, `tool_calls` are the requested calls."""

    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)


class IncrementalDetokenizer:
    """Token ids to text, in whole characters: a character that spans several ids appears with the last of them."""

    def __init__(self, codec: TokenDecoder, continues: bool = False) -> None:
        self._codec = codec
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # the first blank of a text is SentencePiece's dummy prefix
        self._at_start = codec.family.blank_before_text and not continues

    def feed(self, id_: int) -> str:
        """Text completed by this id, possibly empty."""
        return self._without_prefix(self._utf8.decode(self._codec.token_bytes(id_)))

    def finish(self) -> str:
        """One replacement character if the last character is incomplete, else nothing."""
        return self._without_prefix(self._utf8.decode(b"", final=True))

    def _without_prefix(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text


def decode(ids: Iterable[int], codec: TokenDecoder) -> str:
    """Text of ids; ids without text (padding, -100, special tokens, unused rows) are ignored."""
    detokenizer = IncrementalDetokenizer(codec)
    return "".join([*(detokenizer.feed(id_) for id_ in ids), detokenizer.finish()])


class AnswerParser:
    """Parses an answer id by id: `feed` and `finish` return text for the user, `answer` is the state so far.

    The returned deltas, joined, always equal `answer.content`. With `tools` (names), a segment that may be a tool
    call is held back until it is known whether it is one.
    """

    def __init__(self, codec: TokenDecoder, tools: Iterable[str] = ()) -> None:
        self._codec = codec
        self._tools = frozenset(tools)
        self._format = tool_format(codec.family)
        has_roles = ROLE_TAGS[2] in codec.family.special_tokens
        self._next_segment = codec.special_token_id(ROLE_TAGS[2]) if has_roles else None
        self.answer = Answer()
        self._detokenizer = IncrementalDetokenizer(codec)
        self._held = ""
        self._is_content = False  # the current segment is known to be text for the user

    def feed(self, id_: int) -> str:
        """New text for the user after this id, possibly empty."""
        if id_ == self._next_segment:
            return self.finish()
        return self._add(self._detokenizer.feed(id_))

    def finish(self, is_cut: bool = False) -> str:
        """End the segment: parse a held-back call, or return the held-back text.

        is_cut: the answer ended because it was too long; the beginning of a call is then dropped.
        """
        delta = self._add(self._detokenizer.finish())
        held, is_content = self._held, self._is_content
        self._start_segment()
        if is_content:
            return delta
        metadata, content = split_metadata(held, self._tools, self._format)
        call = self._format.parse(metadata, content) if metadata else None
        if call:
            self.answer.tool_calls.append(call)
            return delta
        if is_cut and (metadata or held.strip()):
            return delta
        return delta + self._emit(content if not metadata else held)

    def _start_segment(self) -> None:
        self._detokenizer = IncrementalDetokenizer(self._codec)
        self._held = ""
        self._is_content = False

    def _add(self, text: str) -> str:
        if self._is_content:
            return self._emit(text)
        self._held += text
        if self._may_be_header_or_call():
            return ""
        self._is_content = True
        held, self._held = self._held, ""
        return self._emit(split_metadata(held, self._tools, self._format)[1])

    def _may_be_header_or_call(self) -> bool:
        """True while the held text can still turn out to be a header or a tool call."""
        head, newline, body = self._held.partition("\n")
        head = head.strip()
        if not head or not self._tools:
            return not head and not body  # the blank after an empty header is the body's dummy prefix
        if not newline:
            return any(name.startswith(head) for name in self._tools)
        return head in self._tools and self._format.may_start(body)

    def _emit(self, text: str) -> str:
        self.answer.content += text
        return text


def parse_answer(ids: Iterable[int], codec: TokenDecoder, tools: Iterable[str] = ()) -> Answer:
    """Parse a complete answer; the content equals what streaming the same ids returns."""
    parser = AnswerParser(codec, tools)
    for id_ in ids:
        parser.feed(id_)
    parser.finish()
    return parser.answer


def split_metadata(text: str, tools: Iterable[str] = (), format_: ToolFormat | None = None) -> tuple[str, str]:
    """(metadata, content) of one segment; defined for every text.

    The model generates `metadata`, a newline and the content. A first line counts as metadata only if it is empty or
    the name of an offered tool: fine-tuned models often omit the header, and then the whole text is content.
    """
    format_ = format_ or tool_format(CHATGLM3)
    head, newline, body = text.partition("\n")
    if newline and not head.strip():
        return "", body.removeprefix(format_.body_prefix)
    if newline and head.strip() in frozenset(tools) and format_.may_start(body):
        return head.strip(), body.removeprefix(format_.body_prefix)
    return "", text
