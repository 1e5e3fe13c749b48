"""Bytes to text, and text to JSON rows; a whole file at once or in chunks."""

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from entrypoints.errors import UserError

CHUNK_BYTES = 1 << 20
MAX_ROW_CHARS = 64 << 20
NEWLINE = b"\n"
TRUNCATION_MARGIN_CHARS = 12  # a value cut by the end of a chunk shows as an error within the last 12 characters
JSON_BLANK = re.compile(r"[ \t\r\n]*")
MESSAGE_KEYS = frozenset({"role", "from", "human"})  # an object with one of them is a message, not a row
FORMAT_HINT = "rows must be JSON objects: one per line, one after another, or in one array; name CSV files .csv or .tsv"
# {"data": [{…}, …]}, after other fields with plain values; the rows are in the array
WRAPPER = re.compile(
    r"""\{\s* (?:"[^"\\]*" \s*:\s* (?:"[^"\\]*(?:\\.[^"\\]*)*" | [-+.\w]+) \s*,\s*)*
    "data" \s*:\s* (?P<array>\[\s*) (?=\{)""",
    re.VERBOSE | re.DOTALL,
)
WRAPPER_CHARS = 64  # read before the first row is looked at
JSON_TYPE_NAMES = {
    list: "an array", str: "a string", type(None): "null", bool: "a boolean", int: "a number", float: "a number",
    dict: "an object",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One JSON object of a file; `line` counts from 1 and is the line in which the object starts."""

    file: Path
    line: int
    fields: dict[str, Any]


def type_name(value: object) -> str:
    """The JSON type of a value with its article, for messages."""
    return JSON_TYPE_NAMES.get(type(value), type(value).__name__)


def decode(data: bytes, file: Path, encoding: str) -> str:
    """Text of a whole file, without a byte order mark.

    Raises UserError: unknown encoding, or invalid bytes with their line.
    """
    decoder = _decoder(encoding)
    try:
        return decoder.decode(data, final=True).removeprefix("\ufeff")
    except UnicodeError as error:
        start = getattr(error, "start", 0)  # missing for UTF-16 without its byte order mark
        raise _decode_error(f"{file}:{data.count(NEWLINE, 0, start) + 1}", start, encoding, data) from None


def _decoder(encoding: str) -> codecs.IncrementalDecoder:
    try:
        io.TextIOWrapper(io.BytesIO(), encoding)  # rejects codecs that are no text encodings, such as hex
        return codecs.getincrementaldecoder(encoding)()
    except (LookupError, ValueError):  # ValueError for a name with a null character
        raise _unknown_encoding_error(encoding) from None


def _unknown_encoding_error(encoding: str) -> UserError:
    return UserError(f"--encoding {encoding} is not a known encoding", "use utf-8 or gb18030")


def _decode_error(place: str, offset: int, encoding: str, data: bytes) -> UserError:
    return UserError(f"{place}: byte {offset} of the file is not {encoding}", _encoding_remedy(data, encoding))


def _encoding_remedy(data: bytes, encoding: str) -> str:
    likely = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "gb18030"
    if encoding.lower() == likely:
        return "the file has another encoding or is damaged: save it as UTF-8 and omit --encoding"
    return f"pass --encoding {likely} if the file was saved in it, or save it as UTF-8"


class ChunkReader:
    """Decodes a byte stream chunk by chunk."""

    def __init__(self, stream: BinaryIO, file: Path, encoding: str) -> None:
        self.stream, self.file, self.encoding = stream, file, encoding
        self.offset, self.line = 0, 1  # of the next byte
        self._at_start = True
        self._decoder = _decoder(encoding)

    def read(self, min_bytes: int) -> str:
        """The next characters; "" at the end of the file.

        Raises UserError: invalid bytes, with their line and offset in the file.
        """
        data = self.stream.read(max(CHUNK_BYTES, min_bytes))
        pending, _ = self._decoder.getstate()
        try:
            text = self._decoder.decode(data, final=not data)
        except UnicodeError as error:
            start = getattr(error, "start", 0)
            chunk, offset = pending + data, self.offset - len(pending) + start
            line = self.line + chunk.count(NEWLINE, 0, start)
            raise _decode_error(f"{self.file}:{line}", offset, self.encoding, chunk) from None
        self.offset, self.line = self.offset + len(data), self.line + data.count(b"\n")
        if data and not text:  # an incomplete character
            return self.read(min_bytes)
        if self._at_start and data:
            self._at_start = False
            return text.removeprefix("\ufeff") or self.read(min_bytes)
        return text


def _no_more(min_chars: int) -> str:
    return ""


class Scanner:
    """Scans a text object by object; linear in its length, also for one row that spans many lines.

    read_more: returns the characters after the text, at least the given number if there are, and "" at the end.
    """

    def __init__(self, text: str, file: Path, read_more: Callable[[int], str] = _no_more) -> None:
        self._text = text
        self._file = file
        self._read_more = read_more
        self._position = 0
        self._line = 1
        self._dropped_chars = 0  # of the line in which the text starts
        self._decode = json.JSONDecoder().raw_decode

    def rows(self) -> Iterator[Row]:
        """Every row.

        Raises UserError: names file, line and column where the text is not a row.
        """
        is_wrapped = self._peek() == "{" and self._wrapped_array(at_start=True) is not None
        while character := self._peek():
            if character == "[":
                yield from self._array()
            elif is_wrapped and (start := self._wrapped_array()) is not None:
                self._move_to(start)
                yield from self._array()
                self._end_of_wrapper()
            else:
                yield self._row()

    def _wrapped_array(self, at_start: bool = False) -> int | None:
        """Position of the array in `{"data": [row, …]}`; None without one, or where `data` is a column of messages."""
        while at_start and len(self._text) < WRAPPER_CHARS and self._extend():
            pass
        match = WRAPPER.match(self._text, self._position)
        if not match:
            return None
        try:
            first, _ = self._decode(self._text, match.end())
        except (ValueError, RecursionError):  # longer than the text read so far
            return match.start("array")
        return None if first.keys() & MESSAGE_KEYS else match.start("array")

    def _end_of_wrapper(self) -> None:
        """Skip what follows the rows in their object."""
        while self._peek() == ",":
            self._move_to(self._position + 1)
            self._peek()
            self._value()
            if self._peek() != ":":
                raise self._malformed_error("expecting ':'", self._position)
            self._move_to(self._position + 1)
            self._peek()
            self._value()
        if self._peek() != "}":
            raise self._malformed_error("expecting ',' or '}'", self._position)
        self._move_to(self._position + 1)

    def _array(self) -> Iterator[Row]:
        self._move_to(self._position + 1)
        if self._peek() != "]":
            yield self._row()
            while self._peek() == ",":
                self._move_to(self._position + 1)
                yield self._row()
        if self._peek() != "]":
            raise self._malformed_error("expecting ',' or ']'", self._position)
        self._move_to(self._position + 1)

    def _row(self) -> Row:
        self._peek()
        start_line = self._line
        value = self._value()
        if not isinstance(value, dict):
            raise UserError(f"{self._file}:{start_line}: this row is {type_name(value)}, not an object", FORMAT_HINT)
        return Row(self._file, start_line, value)

    def _value(self) -> Any:
        """The JSON value that starts here."""
        try:
            value, end = self._decode(self._text, self._position)
        except (ValueError, RecursionError) as error:  # ValueError also for a number of more than 4,300 digits
            message, position = getattr(error, "msg", str(error)), getattr(error, "pos", self._position)
            near_end = position >= len(self._text) - TRUNCATION_MARGIN_CHARS
            if (near_end or message.startswith("Unterminated string")) and self._extend():
                return self._value()
            raise self._malformed_error(message, position) from error
        self._move_to(end)
        return value

    def _peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        self._skip_blanks()
        while self._position == len(self._text) and self._extend():
            self._skip_blanks()
        return self._text[self._position : self._position + 1]

    def _skip_blanks(self) -> None:
        if match := JSON_BLANK.match(self._text, self._position):
            self._move_to(match.end())

    def _extend(self) -> bool:
        """Read more text; False at the end of the file. Raises UserError: one row is longer than MAX_ROW_CHARS."""
        # at least as much again as is unparsed: a long row is parsed again only log(length) times
        more = self._read_more(len(self._text) - self._position)
        if not more:
            return False
        if len(self._text) - self._position > MAX_ROW_CHARS:
            problem = f"{self._file}:{self._line}: this row has more than {MAX_ROW_CHARS >> 20} million characters"
            raise UserError(problem, FORMAT_HINT)
        newline = self._text.rfind("\n", 0, self._position)
        before = self._dropped_chars + self._position if newline < 0 else self._position - newline - 1
        self._dropped_chars = before
        self._text, self._position = self._text[self._position :] + more, 0
        return True

    def _move_to(self, position: int) -> None:
        self._line += self._text.count("\n", self._position, position)
        self._position = position

    def _malformed_error(self, message: str, position: int) -> UserError:
        line = self._line + self._text.count("\n", self._position, position)
        newline = self._text.rfind("\n", 0, position)
        column = position - newline + (self._dropped_chars if newline < 0 else 0)
        row_start = f" (the row starts in line {self._line})" if line != self._line else ""
        return UserError(f"{self._file}:{line}:{column}: not JSON: {message}{row_start}", FORMAT_HINT)
