"""Rows and examples from a file of JSON objects: its content decides how it is read, never its suffix or the locale.

Reads the whole file into memory (a 100,000-row file takes under a second); knows no model and no tokenizer.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entrypoints.errors import UserError
from entrypoints.prompt import as_messages

JSON_BLANK = re.compile(r"[ \t\r\n]*")
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # "\ud83d" alone in JSON: no tokenizer and no UTF-8 file can hold it
SHAPES = "rows are JSON objects: one a line, one after another, or in one array"
NAMES = {list: "an array", str: "a string", type(None): "null", bool: "a boolean", int: "a number", float: "a number"}


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a file; `line` counts from 1 and is where the object starts."""

    file: Path
    line: int
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the fields that hold the prompt, the response and, for several turns, the earlier ones.

    conversations: in place of the others, the field with all turns as messages of the API: role, content, and where
    there are any metadata (the tool that is called) and tools (on the system turn).
    """

    prompt: str = "content"
    response: str = "summary"
    history: str | None = None
    conversations: str | None = None

    def flags(self) -> dict[str, str]:
        """The flag of every column that is in use, with the name it was given."""
        if self.conversations is not None:
            return {"--conversations-column": self.conversations}
        names = {"--prompt-column": self.prompt, "--response-column": self.response, "--history-column": self.history}
        return {flag: name for flag, name in names.items() if name is not None}


@dataclass(frozen=True, slots=True)
class Example:
    """A usable row; `index` counts the rows of its file from 0, skipped ones too; history is (question, answer).

    turns: all messages of a conversation, the answer too; prompt and response are then the last texts of its kind.
    """

    file: Path
    line: int
    index: int
    prompt: str
    response: str
    history: list[tuple[str, str]] = field(default_factory=list)
    turns: list[dict] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that cannot be learnt from, and why; the first reason where there are several."""

    file: Path
    line: int
    reason: str


def read_rows(path: Path, encoding: str = "utf-8") -> list[Row]:
    """Every row of a file, in its order; a byte order mark and blank lines do not matter.

    Raises UserError: no such file, a folder, unreadable, or anything `parse_rows` refuses.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder", "name a file in it, such as train.json")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no file {path}", "check the path") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "check its permissions") from error
    return parse_rows(data, path, encoding)


def parse_rows(data: bytes, file: Path, encoding: str = "utf-8") -> list[Row]:
    """Every row in the bytes of a file; `file` only names it in rows and errors.

    Raises UserError with file, line and column: undecodable bytes, malformed JSON, a row that is no object, no row.
    """
    rows = list(_Scanner(_decode(data, file, encoding), file).rows())
    if not rows:
        raise UserError(f"{file} is empty" if not data else f"{file} holds no rows", SHAPES)
    return rows


def column_counts(rows: list[Row]) -> dict[str, int]:
    """How many rows have each column, in the order the columns first appear."""
    return dict(Counter(column for row in rows for column in row.fields))


def examples(rows: list[Row], columns: Columns, strict: bool = False) -> tuple[list[Example], list[Skipped]]:
    """Split rows into usable examples and skipped rows; together they are all the rows, in order.

    No, null or [] in the history column means: no history.
    Raises UserError: a column that no row has, no usable row at all, with `strict` also a single skipped row.
    """
    _require_columns(rows, columns)
    used, skipped = [], []
    position = Counter()  # of the next row, for each file
    for row in rows:
        reason = _problem(row.fields, columns)
        if reason:
            skipped.append(Skipped(row.file, row.line, reason))
        else:
            used.append(_example(row, position[row.file], columns))
        position[row.file] += 1
    if skipped and (strict or not used):
        counts = ", ".join(
            f"{count} {reason}" for reason, count in Counter(row.reason for row in skipped).most_common()
        )
        problem = f"{len(skipped)} of {len(rows)} rows" if used else "no usable row"
        raise UserError(
            f"{problem} in {rows[0].file.name}: {counts} (first in line {skipped[0].line})",
            f"mend the rows or name other columns with {' and '.join(columns.flags())}",
        )
    return used, skipped


def _example(row: Row, index: int, columns: Columns) -> Example:
    if columns.conversations is not None:
        turns = row.fields[columns.conversations]
        asked = [turn["content"] for turn in turns if turn["role"] == "user"]
        return Example(row.file, row.line, index, asked[-1] if asked else "", turns[-1]["content"], turns=turns)
    history = [(question, answer) for question, answer in _history(row.fields, columns)]
    return Example(row.file, row.line, index, row.fields[columns.prompt], row.fields[columns.response], history)


def _decode(data: bytes, file: Path, encoding: str) -> str:
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except LookupError:
        raise UserError(f"--encoding {encoding} is no known encoding", "use utf-8 or gb18030") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = f"{file}:{line}: byte {error.start} of the file is not {encoding}"
        raise UserError(problem, _encoding_remedy(data, encoding)) from None


def _encoding_remedy(data: bytes, encoding: str) -> str:
    if data.startswith(b"\x1f\x8b"):
        return "it is gzip: unpack it, or give an AdvertiseGen archive to `glm data split`"
    likely = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "gb18030"
    if encoding.lower() == likely:
        return "it is another encoding, or damaged: save it as UTF-8 and leave --encoding out"
    return f"pass --encoding {likely} if that is how it was saved, or save it as UTF-8"


class _Scanner:
    """Walks through a text object by object; linear in its length, also for one row over many lines."""

    def __init__(self, text: str, file: Path) -> None:
        self.text = text
        self.file = file
        self.position = 0
        self.line = 1
        self.decode = json.JSONDecoder().raw_decode

    def rows(self) -> Iterator[Row]:
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
            raise self._malformed(getattr(error, "msg", str(error)), getattr(error, "pos", self.position)) from error
        if not isinstance(value, dict):
            raise UserError(f"{self.file}:{start}: this row is {NAMES[type(value)]}, not an object", SHAPES)
        self._move_to(end)
        return Row(self.file, start, value)

    def _peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        self._move_to(JSON_BLANK.match(self.text, self.position).end())
        return self.text[self.position : self.position + 1]

    def _move_to(self, position: int) -> None:
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def _malformed(self, message: str, position: int) -> UserError:
        line = self.line + self.text.count("\n", self.position, position)
        column = position - self.text.rfind("\n", 0, position)
        since = f" (the row starts in line {self.line})" if line != self.line else ""
        return UserError(f"{self.file}:{line}:{column}: not JSON: {message}{since}", SHAPES)


def _require_columns(rows: list[Row], columns: Columns) -> None:
    if not rows:
        raise UserError("there are no rows", "name a file that holds some")
    present = column_counts(rows)
    missing = {flag: name for flag, name in columns.flags().items() if name not in present}
    if missing:
        names = " and ".join(f"no column {name!r}" for name in missing.values())
        raise UserError(
            f"{names} in {rows[0].file.name}; columns: {', '.join(present)}",
            f"name the right one with {' and '.join(missing)}",
        )


def _problem(fields: dict[str, Any], columns: Columns) -> str | None:
    if columns.conversations is not None:
        return _conversation_problem(fields, columns.conversations)
    for role, column in (("prompt", columns.prompt), ("response", columns.response)):
        if column not in fields:
            return f"no column {column!r}"
        value = fields[column]
        if value is None:
            return f"null {role}"
        if not isinstance(value, str):
            return f"{role} is not a string"
        if not value.strip():
            return f"empty {role}"
        if HALF_CHARACTER.search(value):
            return f"{role} holds half a character (a lone surrogate)"
    pairs = _history(fields, columns)
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        return "history is not a list of [question, answer] pairs"
    if any(HALF_CHARACTER.search(text) for pair in pairs for text in pair):
        return "history holds half a character (a lone surrogate)"
    return None


def _conversation_problem(fields: dict[str, Any], column: str) -> str | None:
    turns = fields.get(column)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return f"{column!r} is not a list of messages"
    try:
        messages = as_messages(turns)
    except UserError as error:
        return error.problem
    if not messages or messages[-1].role != "assistant":
        return "the conversation does not end with an answer"
    if not messages[-1].content.strip():
        return "empty response"
    if len(messages) < 2 or messages[-2].role not in ("user", "observation"):
        return "the last answer follows no question"
    if HALF_CHARACTER.search(json.dumps(turns, ensure_ascii=False)):
        return "the conversation holds half a character (a lone surrogate)"
    return None


def _history(fields: dict[str, Any], columns: Columns) -> Any:
    value = fields.get(columns.history) if columns.history is not None else None
    return [] if value is None else value


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
