"""One row as an example: a question with its answer, or a conversation. A row that cannot be used has a reason."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entrypoints.chat_format.openai_messages import from_openai_messages, is_empty
from entrypoints.chat_format.prompt import Message, as_messages, split_answer
from entrypoints.chat_format.truncation import TokenLimitError
from entrypoints.dataset import conversations
from entrypoints.dataset.json_stream import MESSAGE_KEYS, Row, type_name
from entrypoints.dataset.moss import moss_messages
from entrypoints.dataset.shapes import MOSS, Shape
from entrypoints.errors import UserError

LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # "\ud83d" alone in JSON: neither a tokenizer nor UTF-8 can encode it
HALF_CHARACTER = "contains half a character (a lone surrogate)"
MISSING = object()


@dataclass(frozen=True, slots=True)
class Example:
    """A usable row; `index` counts all rows that were read from 0, history is (question, answer) pairs.

    turns: all messages of a conversation, the answer included; prompt is then the last question, and response the last
    answer as text: a call is the name of its tool and its code. rejected: the worse answer of a preference row.
    """

    file: Path
    line: int
    index: int
    prompt: str
    response: str
    history: list[tuple[str, str]] = field(default_factory=list)
    turns: list[Message] = field(default_factory=list)
    rejected: list[Message] = field(default_factory=list)

    def messages(self) -> list[Message]:
        """All turns, the answer last."""
        return self.turns or as_messages([*self.history, (self.prompt, self.response)])


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """A row that cannot be used, with the first reason.

    least: of a row that exceeds a limit in tokens, the flag and its smallest value that holds the row.
    """

    file: Path
    line: int
    reason: str
    least: tuple[str, int] | None = None

    @classmethod
    def of_error(cls, row: "Row | Example | SkippedRow", error: UserError) -> "SkippedRow":
        """The row for which the error was raised."""
        least = error.least if isinstance(error, TokenLimitError) else None
        return cls(row.file, row.line, error.problem, least)


class RowConverter:
    """Converts the rows of one shape; `unused` counts the rows with a value in each column that has no effect."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.unused: Counter[str] = Counter()
        self._columns = shape.columns
        self._prompt, self._response = shape.prompt or "", shape.response or ""
        self._needed = ((self._prompt, "prompt"), (self._response, "response"))
        self._optional = tuple(name for name in (shape.input, shape.history, shape.system, shape.tools) if name)

    def convert(self, row: Row, index: int) -> Example | SkippedRow:
        """The row as an example, or why it is skipped."""
        fields = row.fields
        if not fields.keys() <= self._columns:
            for name in fields.keys() - self._columns:
                if not is_empty(fields[name]):
                    self.unused[name] += 1
        try:
            return self._example(row, index)
        except UserError as error:
            return SkippedRow.of_error(row, error)

    def _example(self, row: Row, index: int) -> Example | SkippedRow:
        fields = row.fields
        if self.shape.conversations is not None:
            return self._conversation(row, index, self._turns(fields))
        if any(is_messages(fields.get(column)) for column, _ in self._needed):
            return self._conversation(row, index, self._prompt_turns(fields))
        return self._pair(row, index)

    def _pair(self, row: Row, index: int) -> Example | SkippedRow:
        fields = row.fields
        for column, role in self._needed:
            value = fields.get(column, MISSING)
            if type(value) is not str or not value.strip() or LONE_SURROGATE.search(value):
                return SkippedRow(row.file, row.line, text_problem(value, column, role))
        prompt, response = fields[self._prompt], fields[self._response]
        given = {name: fields[name] for name in self._optional if not is_empty(fields.get(name))}
        if not given:
            return Example(row.file, row.line, index, prompt, response)
        return self._extended_pair(Example(row.file, row.line, index, prompt, response), given)

    def _extended_pair(self, pair: Example, given: dict[str, Any]) -> Example | SkippedRow:
        """The pair with its input, its history, its system text and its tools, as far as they are given."""
        shape = self.shape
        history = conversations.parsed(given.get(shape.history or "", []))
        pairs = _as_pairs(history)
        if pairs is not None and not given.keys() & {shape.system, shape.tools}:
            if any(LONE_SURROGATE.search(text) for texts in pairs for text in texts):
                return SkippedRow(pair.file, pair.line, f"history {HALF_CHARACTER}")
            prompt = self._with_input(pair.prompt, given)
            return Example(pair.file, pair.line, pair.index, prompt, pair.response, pairs)
        turns = [*self._question(pair.prompt, given), {"role": "assistant", "content": pair.response}]
        return self._conversation(Row(pair.file, pair.line, given), pair.index, turns)

    def _with_input(self, prompt: str, fields: dict[str, Any]) -> str:
        added = _text(fields, self.shape.input)
        return f"{prompt}\n{added}" if added else prompt

    def _question(self, prompt: str, fields: dict[str, Any]) -> list[conversations.Message]:
        """The messages of the history, and the prompt with its input."""
        return [*self._earlier(fields), {"role": "user", "content": self._with_input(prompt, fields)}]

    def _earlier(self, fields: dict[str, Any]) -> list[conversations.Message]:
        column = self.shape.history
        earlier = conversations.as_messages(fields.get(column), column, self.unused) if column else []
        if earlier and earlier[-1]["role"] != "assistant":
            raise UserError(f"column {column!r} does not end with an answer", "")
        return earlier

    def _turns(self, fields: dict[str, Any]) -> list[conversations.Message]:
        column = self.shape.conversations or ""
        if column not in fields:
            raise UserError(f"no column {column!r}", "")
        if self.shape in MOSS.values():
            return moss_messages(fields, self.unused)
        return conversations.as_messages(fields[column], column, self.unused)

    def _prompt_turns(self, fields: dict[str, Any]) -> list[conversations.Message]:
        """The messages of TRL's conversational form: a list in the column of the prompt, and one in the other."""
        turns: list[conversations.Message] = []
        for (column, _), role in zip(self._needed, ("user", "assistant"), strict=True):
            value = fields.get(column)
            plain = [{"role": role, "content": value}] if isinstance(value, str) else None
            turns += plain or conversations.as_messages(value, column, self.unused)
        return turns

    def _conversation(self, row: Row, index: int, messages: list[conversations.Message]) -> Example | SkippedRow:
        turns = from_openai_messages(self._with_system(row.fields, messages), _tools(row.fields, self.shape.tools))
        before, answer = split_answer(turns)
        if problem := _answer_problem(before, answer) or _surrogate_problem(turns):
            return SkippedRow(row.file, row.line, problem)
        questions = [turn.content for turn in before if turn.role == "user"]
        return Example(row.file, row.line, index, questions[-1] if questions else "", answer_text(answer), turns=turns)

    def _with_system(
        self, fields: dict[str, Any], messages: list[conversations.Message]
    ) -> list[conversations.Message]:
        system = _text(fields, self.shape.system)
        if not system:
            return messages
        if messages and messages[0]["role"] in ("system", "developer"):
            if messages[0]["content"] == system:
                return messages
            raise UserError(f"column {self.shape.system!r} and the first turn hold different system texts", "")
        return [{"role": "system", "content": system}, *messages]


def answer_text(answer: list[Message]) -> str:
    """An answer in one text: each tool call with the name of its tool in the line before."""
    return "\n".join(f"{turn.metadata}\n{turn.content}" if turn.metadata else turn.content for turn in answer)


def is_messages(value: Any) -> bool:
    """Whether a column holds a list of messages in place of a text."""
    is_list = isinstance(value, list) and bool(value) and isinstance(value[0], dict)
    return is_list and bool(value[0].keys() & MESSAGE_KEYS)


def _text(fields: dict[str, Any], column: str | None) -> str:
    value = fields.get(column) if column is not None else None
    if is_empty(value):
        return ""
    if not isinstance(value, str):
        raise UserError(f"column {column!r} is {type_name(value)}, not a string", "")
    return value if value.strip() else ""


def text_problem(value: Any, column: str, role: str) -> str:
    """Why a value is not a text with something in it; MISSING where the row lacks the column."""
    if value is MISSING:
        return f"no column {column!r}"
    if value is None:
        return f"null {role}"
    if not isinstance(value, str):
        return f"column {column!r} is {type_name(value)}, not a string"
    return f"{role} {HALF_CHARACTER}" if value.strip() else f"empty {role}"


def _as_pairs(history: Any) -> list[tuple[str, str]] | None:
    """A history that is a list of two texts each; None for another form."""
    if not isinstance(history, list):
        return None
    is_pair = all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    )
    return [(question, answer) for question, answer in history] if is_pair else None


def _tools(fields: dict[str, Any], column: str | None) -> list[Any]:
    value = conversations.parsed(fields.get(column)) if column is not None else None
    if is_empty(value):
        return []
    if not isinstance(value, list):
        raise UserError(f"column {column!r} is {type_name(value)}, not a list of tools", "")
    return value


def _answer_problem(before: list[Message], answer: list[Message]) -> str | None:
    if not answer:
        return "the conversation does not end with an answer"
    if not answer[-1].content.strip():
        return "empty response"
    if not before or before[-1].role not in ("user", "observation"):
        return "the last answer does not follow a question"
    if not any(turn.role == "assistant" and turn.learn for turn in (*before, *answer)):
        return "no answer is learned: each has weight 0"
    return None


def _surrogate_problem(turns: list[Message]) -> str | None:
    for turn in turns:
        tools = json.dumps(turn.tools, ensure_ascii=False) if turn.tools else ""
        if any(LONE_SURROGATE.search(text) for text in (turn.content, turn.metadata, tools)):
            return f"the conversation {HALF_CHARACTER}"
    return None
