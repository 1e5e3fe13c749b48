"""Which fields of a row are learnt, and whether a row can be."""

import json
import re
from dataclasses import dataclass
from typing import Any

from entrypoints.errors import UserError
from entrypoints.openai_turns import to_turns
from entrypoints.prompt import Message

HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # "\ud83d" alone in JSON: no tokenizer and no UTF-8 file can hold it
TOOLS = "tools"  # beside the conversations, as in a request of the API


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the fields that hold the prompt, the response and, for several turns, the earlier ones.

    conversations: in place of the others, the field with all turns as messages of the API, or in ChatGLM3's own form;
    the tools on offer stand beside it, in the field `tools`, or on the system turn.
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


def problem(fields: dict[str, Any], columns: Columns) -> str | None:
    """Why a row cannot be learnt from, the first reason of several; None if it can."""
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
    pairs = history(fields, columns)
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        return "history is not a list of [question, answer] pairs"
    if any(HALF_CHARACTER.search(text) for pair in pairs for text in pair):
        return "history holds half a character (a lone surrogate)"
    return None


def _conversation_problem(fields: dict[str, Any], column: str) -> str | None:
    messages, tools = fields.get(column), fields.get(TOOLS)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return f"{column!r} is not a list of messages"
    if not isinstance(tools, list | None):
        return f"{TOOLS!r} is not a list of tools"
    try:
        turns = conversation(fields, column)
    except UserError as error:
        return error.problem
    if not turns or turns[-1].role != "assistant":
        return "the conversation does not end with an answer"
    if not turns[-1].content.strip():
        return "empty response"
    if len(turns) > 1 and messages[-1].get("tool_calls") and turns[-2].role == "assistant":
        return "the last answer is more than one turn: one text or one call"
    if len(turns) < 2 or turns[-2].role not in ("user", "observation"):
        return "the last answer follows no question"
    texts = [[turn.metadata, turn.content, turn.tools] for turn in turns]
    if HALF_CHARACTER.search(json.dumps(texts, ensure_ascii=False)):
        return "the conversation holds half a character (a lone surrogate)"
    return None


def conversation(fields: dict[str, Any], column: str) -> list[Message]:
    """All turns of a row of messages, the tools on its system turn, as the API would tell them to the model.

    Raises UserError naming the message or the tool that is malformed.
    """
    return to_turns(fields[column], fields.get(TOOLS) or ())


def history(fields: dict[str, Any], columns: Columns) -> Any:
    """The earlier turns as they stand in the row; null and nothing at all mean none."""
    value = fields.get(columns.history) if columns.history is not None else None
    return [] if value is None else value


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
