"""Rows of MOSS: texts with its markers, by turn (`chat`) or in one string (`plain_text`)."""

import re
from collections import Counter
from typing import Any

from entrypoints.chat_format.openai_messages import is_empty
from entrypoints.dataset.conversations import Message
from entrypoints.dataset.json_stream import type_name
from entrypoints.errors import UserError

MARKER = re.compile(r"^\s*<\|[A-Za-z ]+\|>:\s?|\s*<eo[a-z]>\s*$")  # <|Human|>: … <eoh>, <|MOSS|>: … <eom>
TURN_002 = re.compile(r"\[(Human|MOSS)\]:\s?(.*?)\s*<eo[a-z]>", re.DOTALL)
PLUGIN_FIELDS = ("Commands", "Tool Responses")
THOUGHTS = "Inner Thoughts"
TURN_FIELDS = {"Human", THOUGHTS, *PLUGIN_FIELDS, "MOSS"}


def is_moss(fields: dict[str, Any]) -> bool:
    """Whether a row has the turns of moss-003-sft or the text of moss-002-sft."""
    chat, text = fields.get("chat"), fields.get("plain_text")
    has_turns = isinstance(chat, dict) and any(name.startswith("turn_") for name in chat)
    return has_turns or (isinstance(text, str) and bool(TURN_002.search(text)))


def moss_messages(fields: dict[str, Any], unused: Counter[str]) -> list[Message]:
    """The messages of a row. Raises UserError for a turn with a plugin call, which has no definition of a tool."""
    chat = fields.get("chat")
    if not isinstance(chat, dict):
        text, roles = str(fields.get("plain_text")), {"Human": "user", "MOSS": "assistant"}
        if TURN_002.sub("", text).strip():
            raise UserError("plain_text has text outside [Human]: … <eoh> and [MOSS]: … <eoa>", "complete its markers")
        return [{"role": roles[role], "content": turn} for role, turn in TURN_002.findall(text)]
    messages: list[Message] = []
    for name in sorted(chat, key=lambda name: int(name.removeprefix("turn_")) if name[5:].isdecimal() else 0):
        if not isinstance(chat[name], dict):
            raise UserError(f"{name} of the chat is {type_name(chat[name])}, not an object", "see the data guide")
        turn = {key: MARKER.sub("", text).strip() for key, text in chat[name].items() if isinstance(text, str)}
        for key in chat[name].keys() - TURN_FIELDS:
            if not is_empty(chat[name][key]):
                unused[f"chat.{key}"] += 1
        called = [key for key in PLUGIN_FIELDS if turn.get(key, "None") not in ("None", "")]
        if called:
            raise UserError(f"{name} has {called[0]} of a MOSS plugin", "convert it to messages with tools")
        if turn.get(THOUGHTS, "None") not in ("None", ""):
            unused[f"chat.{THOUGHTS}"] += 1
        messages += [{"role": "user", "content": turn.get("Human")}, {"role": "assistant", "content": turn.get("MOSS")}]
    return messages
