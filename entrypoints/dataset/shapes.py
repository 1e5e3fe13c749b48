"""The shapes in which training rows are published, and how the shape of a file is recognized from its first rows."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from entrypoints.dataset.columns import Columns
from entrypoints.dataset.conversations import parsed
from entrypoints.dataset.json_stream import Row
from entrypoints.dataset.moss import is_moss
from entrypoints.errors import UserError

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
TOOLS_COLUMN = "tools"  # next to the conversation, as in an API request
CHOSEN, REJECTED = "chosen", "rejected"  # the answers of a preference row, if no flag names other columns


@dataclass(frozen=True, slots=True)
class Shape:
    """Which column of a row holds what; None: the shape has none.

    conversations: column with all turns; then prompt, response, input and history are None.
    rejected: column with the answer that is not preferred. Such a row holds its conversation, if not in the answers,
    without an answer, and the preferred one in the column `response`.
    """

    name: str
    prompt: str | None = None
    response: str | None = None
    input: str | None = None
    history: str | None = None
    conversations: str | None = None
    system: str | None = None
    tools: str | None = None
    rejected: str | None = None

    @property
    def columns(self) -> frozenset[str]:
        """All columns that are used."""
        names = (self.prompt, self.response, self.input, self.history, self.conversations, self.system, self.tools)
        return frozenset(name for name in (*names, self.rejected) if name is not None)


def _pairs(name: str, prompt: str, response: str, input: str | None = None) -> Shape:
    return Shape(name, prompt, response, input, "history", system="system", tools=TOOLS_COLUMN)


def _turns(name: str, column: str, system: str = "system") -> Shape:
    return Shape(name, conversations=column, system=system, tools=TOOLS_COLUMN)


DEFAULT = _pairs("columns content and summary", "content", "summary")
PAIR_SHAPES = {  # in the order in which they are tried
    "alpaca": _pairs("Alpaca", "instruction", "output", "input"),
    "prompt-completion": _pairs("prompt and completion", "prompt", "completion"),
    "prompt-response": _pairs("prompt and response", "prompt", "response"),
    "columns": DEFAULT,
    "firefly": _pairs("Firefly", "input", "target"),
    "query-response": _pairs("query and response", "query", "response"),
}
PREFERENCE_SHAPES = {**PAIR_SHAPES, "question": _pairs("question", "question", "")}  # by their question
MOSS = {name: _turns("MOSS", name, system) for name, system in (("chat", "meta_instruction"), ("plain_text", "prefix"))}
CONVERSATION_NAMES = {"from": "ShareGPT", "role": "messages", "human": "Firefly", "user": "Firefly"}
CONVERSATION_FORMATS = {"sharegpt": "ShareGPT", "messages": "messages", "firefly": "Firefly"}


def resolve(columns: Columns, sample: Sequence[Row]) -> Shape:
    """The shape of a file: that of the flags, else the most frequent one of its first rows, else DEFAULT.

    Raises UserError: preference rows, which have two answers, unless the columns name the rejected one.
    """
    explicit = {name: getattr(columns, name) for name in ("input", "history", "system") if getattr(columns, name)}
    resolve_shape = _resolve if columns.rejected is None else _resolve_preferences
    shape = resolve_shape(columns, sample, explicit)
    without_effect = [f"--{name}-column" for name in ("input", "history") if name in explicit and not shape.prompt]
    if without_effect:
        problem = f"{' and '.join(without_effect)} has no effect on rows in the shape {shape.name}"
        raise UserError(problem, "omit it: a conversation holds all turns")
    return shape


def _resolve(columns: Columns, sample: Sequence[Row], explicit: dict[str, str]) -> Shape:
    if columns.conversations is not None:
        return replace(_turns("messages", columns.conversations), **explicit)
    if columns.prompt is not None or columns.response is not None or columns.format == "columns":
        prompt, response = columns.prompt or DEFAULT.prompt, columns.response or DEFAULT.response
        return Shape(f"columns {prompt} and {response}", prompt, response, **explicit)
    found = Counter(shape for row in sample if (shape := _shape_of(row.fields, columns.format)))
    if found:
        return replace(found.most_common(1)[0][0], **explicit)
    if columns.format in PAIR_SHAPES:
        return replace(PAIR_SHAPES[columns.format], **explicit)
    if columns.format == "moss":
        return MOSS["chat"]
    if columns.format in CONVERSATION_FORMATS:
        return _turns(CONVERSATION_FORMATS[columns.format], CONVERSATION_COLUMNS[columns.format == "sharegpt"])
    if sample and sample[0].fields.keys() >= {CHOSEN, REJECTED}:
        problem = f"{sample[0].file}:{sample[0].line}: the row has two answers, chosen and rejected"
        remedy = "glm train --objective dpo learns from both; or use one: --prompt-column NAME --response-column chosen"
        raise UserError(problem, remedy)
    return replace(DEFAULT, **explicit)


def _resolve_preferences(columns: Columns, sample: Sequence[Row], explicit: dict[str, str]) -> Shape:
    """The shape of preference rows: that of other rows with the same question, but with two answers."""
    answers = (columns.response or CHOSEN, columns.rejected or REJECTED)
    if columns.conversations is not None:
        asked = _turns("", columns.conversations)
    elif columns.prompt is not None:
        asked = Shape("", columns.prompt)
    else:
        found = Counter(shape for row in sample if (shape := _asked_shape(row.fields, columns.format)))
        asked = found.most_common(1)[0][0] if found else _expected_question(columns.format)
    names = [name for name in (asked.prompt or asked.conversations, *answers) if name]
    return replace(
        asked, name=f"preferences ({', '.join(names)})", response=answers[0], rejected=answers[1], **explicit
    )


def _asked_shape(fields: dict[str, Any], format: str) -> Shape | None:
    """The shape of the question of a preference row, by its column."""
    if shape := _conversation_shape(fields, format):
        return shape
    pairs = [pair for key, pair in PREFERENCE_SHAPES.items() if format in ("auto", key)]
    return next((pair for pair in pairs if pair.prompt in fields), None)


def _expected_question(format: str) -> Shape:
    """The shape of the question where the first rows have none: only in their answers, or in the column of a format."""
    if format in PAIR_SHAPES:
        return PAIR_SHAPES[format]
    if format in CONVERSATION_FORMATS:
        return _turns("", CONVERSATION_COLUMNS[format == "sharegpt"])
    return Shape("", system="system", tools=TOOLS_COLUMN)


def _shape_of(fields: dict[str, Any], format: str) -> Shape | None:
    """The shape of one row, among those of a format; None if it has none of them."""
    if format in ("auto", "moss") and is_moss(fields):
        return MOSS["chat" if isinstance(fields.get("chat"), dict) else "plain_text"]
    if shape := _conversation_shape(fields, format):
        return shape
    for key, pair in PAIR_SHAPES.items():
        if format in ("auto", key) and {pair.prompt, pair.response} <= fields.keys():
            return pair
    return None


def _conversation_shape(fields: dict[str, Any], format: str) -> Shape | None:
    """The shape of a row with a conversation, if it is one of the format."""
    for column in CONVERSATION_COLUMNS:
        turns = parsed(fields.get(column))
        if isinstance(turns, list) and turns:
            first = turns[0]
            names = [name for key, name in CONVERSATION_NAMES.items() if isinstance(first, dict) and key in first]
            name = names[0] if names else "conversation"
            is_wanted = format in ("auto", "messages") or CONVERSATION_FORMATS.get(format) == name
            return _turns(name, column) if is_wanted else None
    return None
