"""Examples as rows of messages in the form of the OpenAI API, which every tool for chat models reads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entrypoints.chat_format.prompt import Message
from entrypoints.chat_format.tool_calls import TOOLS_INTRODUCTION, parse_any_call
from entrypoints.dataset.reader import Example, ExampleReader
from entrypoints.errors import UserError
from entrypoints.file_writing import replaced_file

SUFFIXES = (".jsonl", ".json")


def convert(rows: ExampleReader, target: Path, max_skipped: int | None, overwrite: bool) -> int:
    """Write all examples into `target`, which appears when all are written; returns their number.

    Raises UserError: the file exists and must not be replaced, or cannot be written; more skipped rows than allowed.
    """
    if target.suffix not in SUFFIXES:
        raise UserError(f"{target} is not named {' or '.join(SUFFIXES)}", "the rows are written as JSON lines")
    if target.exists() and (not overwrite or target.resolve() == rows.source.resolve()):
        raise UserError(f"{target} exists", "choose another name, or pass --overwrite to replace a file other than SRC")
    count = 0
    try:
        with replaced_file(target) as partial:
            with partial.open("w", encoding="utf-8") as out:
                for example in rows:
                    if isinstance(example, Example):
                        out.write(json.dumps(messages_row(example.messages()), ensure_ascii=False) + "\n")
                        count += 1
            rows.log()
            rows.check_skipped(max_skipped)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}", "choose a file in a writable folder") from error
    return count


def messages_row(turns: Sequence[Message]) -> dict[str, Any]:
    """A row with `messages` and, if there are any, `tools`, from which `from_openai_messages` makes these turns."""
    beside = bool(turns) and not any(turn.tools for turn in turns[1:])  # else they stay in their system turns
    tools = turns[0].tools if beside else ()
    introduced = bool(tools) and turns[0].content == TOOLS_INTRODUCTION
    messages: list[dict[str, Any]] = []
    waiting: list[str] = []  # ids of calls without a result
    for turn in turns[introduced:]:
        call = _call(turn, sum(len(message.get("tool_calls", ())) for message in messages))
        if call is None:
            kept = {} if beside or not turn.tools else {"tools": list(turn.tools)}
            messages.append({**_message(turn, waiting), **kept})
            continue
        if messages and _is_same_answer(messages[-1], turn):
            messages[-1].setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [call], **_weight(turn)})
        waiting.append(call["id"])
    definitions = [{"type": "function", "function": tool} for tool in tools]
    return {"messages": messages, "tools": definitions} if tools else {"messages": messages}


def _message(turn: Message, waiting: list[str]) -> dict[str, Any]:
    if turn.role == "observation":
        id_ = {"tool_call_id": waiting.pop(0)} if waiting else {}
        return {"role": "tool", **id_, "content": turn.content}
    waiting.clear()
    metadata = {"metadata": turn.metadata} if turn.metadata else {}  # code, but not a call with literals
    return {"role": turn.role, **metadata, "content": turn.content, **_weight(turn)}


def _call(turn: Message, number: int) -> dict[str, Any] | None:
    """A turn that calls a tool in OpenAI's form; None for another turn, or code that is not written as a call."""
    call = parse_any_call(turn.metadata, turn.content) if turn.metadata else None
    if call is None:
        return None
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": f"call_{number}", "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _is_same_answer(message: dict[str, Any], turn: Message) -> bool:
    """Whether a call joins the message before it: a text or other calls of the same answer."""
    is_answer = message["role"] == "assistant" and "metadata" not in message
    is_answer = is_answer and bool(message["content"] or message.get("tool_calls"))  # an empty text stays a turn
    return is_answer and message.get("weight", 1) == int(turn.learn)


def _weight(turn: Message) -> dict[str, int]:
    return {} if turn.learn else {"weight": 0}
