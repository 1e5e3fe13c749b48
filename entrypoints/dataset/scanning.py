"""Bytes to text, and text to rows, whole or piece by piece."""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from entrypoints.errors import UserError

PIECE = 1 << 20  # bytes of a file that is streamed
CUT_SHORT = 12  # characters before the end where a piece that ends within a value shows as an error
JSON_BLANK = re.compile(r"[ \t\r\n]*")
SHAPES = "rows are JSON objects: one a line, one after another, or in one array"
NAMES = {list: "an array", str: "a string", type(None): "null", bool: "a boolean", int: "a number", float: "a number"}


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a file; `line` counts from 1 and is where the object starts."""

    file: Path
    line: int
    fields: dict[str, Any]


def decode(data: bytes, file: Path, encoding: str) -> str:
    """A whole file's text, without a byte order mark; raises UserError with the line of bytes that are not text."""
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except LookupError:
        raise _unknown(encoding) from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _undecodable(file, line, error.start, encoding, data) from None


def _unknown(encoding: str) -> UserError:
    return UserError(f"--encoding {encoding} is no known encoding", "use utf-8 or gb18030")


def _undecodable(file: Path, line: int, offset: int, encoding: str, data: bytes) -> UserError:
    return UserError(f"{file}:{line}: byte {offset} of the file is not {encoding}", _encoding_remedy(data, encoding))


def _encoding_remedy(data: bytes, encoding: str) -> str:
    if data.startswith(b"\x1f\x8b"):
        return "it is gzip: unpack it, or give an AdvertiseGen archive to `glm data split`"
    likely = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "gb18030"
    if encoding.lower() == likely:
        return "it is another encoding, or damaged: save it as UTF-8 and leave --encoding out"
    return f"pass --encoding {likely} if that is how it was saved, or save it as UTF-8"


class Pieces:
    """A stream decoded piece by piece."""

    def __init__(self, stream: BinaryIO, file: Path, encoding: str) -> None:
        self.stream, self.file, self.encoding = stream, file, encoding
        self.offset, self.line = 0, 1  # of the next byte
        self.started = False
        try:
            self.decoder = codecs.getincrementaldecoder(encoding)()
        except LookupError:
            raise _unknown(encoding) from None

    def text(self, least: int) -> str:
        """The next characters; "" at the end."""
        data = self.stream.read(max(PIECE, least))
        held, _ = self.decoder.getstate()
        try:
            text = self.decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            whole, before = held + data, self.offset - len(held)
            line = self.line + whole.count(b"\n", 0, error.start)
            raise _undecodable(self.file, line, before + error.start, self.encoding, whole) from None
        self.offset, self.line = self.offset + len(data), self.line + data.count(b"\n")
        if data and not text:  # half a character
            return self.text(least)
        first, self.started = not self.started, True
        return text.removeprefix("\ufeff") or self.text(least) if first and data else text


class Scanner:
    """Walks through a text object by object; linear in its length, also for one row over many lines.

    more: gives the characters that follow the text, at least so many if there are, and "" at the end.
    """

    def __init__(self, text: str, file: Path, more: Callable[[int], str] = lambda least: "") -> None:
        self.text = text
        self.file = file
        self.more = more
        self.position = 0
        self.line = 1
        self.dropped = 0  # characters of the line in which the text begins
        self.decode = json.JSONDecoder().raw_decode

    def rows(self) -> Iterator[Row]:
        """Every row; raises UserError with file, line and column where the text is no row."""
        while next_one := self._peek():
            if next_one == "[":
                yield from self._array()
            else:
                yield self._row()

    def _array(self) -> Iterator[Row]:
        self._move_to(self.position + 1)
        if self._peek() != "]":
            yield self._row()
            while self._peek() == ",":
                self._move_to(self.position + 1)
                yield self._row()
        if self._peek() != "]":
            raise self._malformed("expecting ',' or ']'", self.position)
        self._move_to(self.position + 1)

    def _row(self) -> Row:
        self._peek()
        start = self.line
        try:
            value, end = self.decode(self.text, self.position)
        except (ValueError, RecursionError) as error:  # ValueError also for a number of more than 4,300 digits
            message, place = getattr(error, "msg", str(error)), getattr(error, "pos", self.position)
            cut_short = place >= len(self.text) - CUT_SHORT or message.startswith("Unterminated string")
            if cut_short and self._grow():
                return self._row()
            raise self._malformed(message, place) from error
        if not isinstance(value, dict):
            raise UserError(f"{self.file}:{start}: this row is {NAMES[type(value)]}, not an object", SHAPES)
        self._move_to(end)
        return Row(self.file, start, value)

    def _peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        self._move_to(JSON_BLANK.match(self.text, self.position).end())
        while self.position == len(self.text) and self._grow():
            self._move_to(JSON_BLANK.match(self.text, self.position).end())
        return self.text[self.position : self.position + 1]

    def _grow(self) -> bool:
        more = self.more(len(self.text) - self.position)  # twice as much each time: a long row is not read anew often
        if not more:
            return False
        last = self.text.rfind("\n", 0, self.position)
        self.dropped = self.position - last - 1 if last >= 0 else self.dropped + self.position
        self.text, self.position = self.text[self.position :] + more, 0
        return True

    def _move_to(self, position: int) -> None:
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def _malformed(self, message: str, position: int) -> UserError:
        line = self.line + self.text.count("\n", self.position, position)
        last = self.text.rfind("\n", 0, position)
        column = position - last + (self.dropped if last < 0 else 0)
        since = f" (the row starts in line {self.line})" if line != self.line else ""
        return UserError(f"{self.file}:{line}:{column}: not JSON: {message}{since}", SHAPES)
