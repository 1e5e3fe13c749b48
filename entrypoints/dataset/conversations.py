"""Conversations in all their public forms, as messages of the OpenAI API.

A conversation, or a history, is a list of messages (`role` and `content`, or ShareGPT's `from` and `value`), of pairs
(two texts, or an object with a question and an answer), or a flat list of texts in which the two take turns.
"""

import json
from collections import Counter
from typing import Any

from entrypoints.chat_format.openai_messages import LEARNED_FIELDS, is_empty
from entrypoints.dataset.json_stream import type_name
from entrypoints.errors import UserError

Message = dict[str, Any]
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "tool_response": "tool", "function_response": "tool", "function": "tool",
}  # fmt: skip
CALL_ROLES = ("function_call", "tool_call")  # their text is a call as JSON, or a list of calls
RESULT_ROLES = ("tool", "observation")
QUESTION_NAMES = ("human", "user", "question", "query", "prompt", "instruction", "input")
ANSWER_NAMES = ("assistant", "gpt", "bot", "answer", "response", "output")
PLAIN_ROLES = ("system", "user", "assistant", "tool", "observation")
PLAIN_FIELDS = {"role", "content", "tool_call_id"}  # of a message that is in the form of the API already
KEPT_FIELDS = ("tool_calls", "tool_call_id", "metadata", "tools", *LEARNED_FIELDS)  # beside role and content
# Of other fields only these are never reported as unused: they repeat what the order of the messages says.
REPEATED_FIELDS = ("role", "from", "content", "value", "name", "id", "type")


def as_messages(value: Any, column: str, unused: Counter[str]) -> list[Message]:
    """The messages of a conversation or history; [] for null and an empty text.

    unused: counts the fields of messages that have a value and no effect, as `column.field`.
    Raises UserError: none of the forms above; names the turn.
    """
    turns = parsed(value)
    if is_empty(turns):
        return []
    if not isinstance(turns, list):
        raise UserError(f"column {column!r} is {type_name(turns)}, not a list of messages", "see glm data check --help")
    if all(isinstance(turn, str) for turn in turns):
        return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(turns)]
    return [message for index, turn in enumerate(turns) for message in _messages_of(turn, index, column, unused)]


def parsed(value: Any) -> Any:
    """A list or object that a CSV cell or a text column holds as JSON; any other value as it is."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _messages_of(turn: Any, index: int, column: str, unused: Counter[str]) -> list[Message]:
    if isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
        return [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    if isinstance(turn, dict):
        if turn.keys() <= PLAIN_FIELDS and turn.get("role") in PLAIN_ROLES and isinstance(turn.get("content"), str):
            return [turn]
        if "role" in turn or "from" in turn:
            return _messages_of_role(turn, index, column, unused)
        question, answer = _named(turn, QUESTION_NAMES), _named(turn, ANSWER_NAMES)
        if question and answer:
            for name in turn:
                if name not in (question, answer) and not is_empty(turn[name]):
                    unused[f"{column}.{name}"] += 1
            return [{"role": "user", "content": turn[question]}, {"role": "assistant", "content": turn[answer]}]
    raise UserError(
        f"column {column!r}: turn {index} is {type_name(turn)} without role and content", "see the data guide"
    )


def _named(turn: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in turn), None)


def _messages_of_role(turn: dict[str, Any], index: int, column: str, unused: Counter[str]) -> list[Message]:
    name = turn.get("role", turn.get("from"))
    role = ROLES.get(name, name) if isinstance(name, str) else name
    content = turn.get("content", turn.get("value"))
    kept = {key: turn[key] for key in KEPT_FIELDS if not is_empty(turn.get(key))}
    used = {*REPEATED_FIELDS, *KEPT_FIELDS}
    if role in CALL_ROLES:
        messages = [{"role": "assistant", "content": "", **kept, "tool_calls": _calls(parsed(content), index)}]
    elif role == "tool" and "parameters" in turn:  # ChatGLM3's fine-tuning form: call and result in one
        used |= {"parameters", "observation"}
        messages = _call_with_result(turn, kept)
    elif role == "assistant" and not is_empty(turn.get("function_call")):  # OpenAI's first form of a call
        used.add("function_call")
        messages = [
            {"role": role, "content": content, **kept, "tool_calls": _calls(parsed(turn["function_call"]), index)}
        ]
    else:
        if "tool_calls" in kept:
            kept["tool_calls"] = _calls(parsed(kept["tool_calls"]), index)
        messages = [{"role": role, "content": _result_text(content) if role in RESULT_ROLES else content, **kept}]
    for key in turn.keys() - used:
        if not is_empty(turn[key]):
            unused[f"{column}.{key}"] += 1
    return messages


def _call_with_result(turn: dict[str, Any], kept: dict[str, Any]) -> list[Message]:
    call = {"function": {"name": turn.get("name"), "arguments": turn["parameters"]}}
    result = turn.get("observation")
    messages: list[Message] = [{"role": "assistant", "content": "", **kept, "tool_calls": [call]}]
    return messages if result is None else [*messages, {"role": "tool", "content": _result_text(result)}]


def _calls(value: Any, index: int) -> list[dict[str, Any]]:
    """Calls in OpenAI's form, also from `{"name": …, "arguments": …}` alone."""
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"turn {index} has a call that is not JSON with name and arguments", "see the data guide")
    return [call if "function" in call else {"function": call} for call in calls]


def _result_text(value: Any) -> Any:
    """A tool's result as text: JSON of anything but text, and but a list of text parts."""
    is_parts = isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value)
    if isinstance(value, str) or value is None or (is_parts and value):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)
