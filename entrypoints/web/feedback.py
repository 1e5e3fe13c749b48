"""Ratings and corrections of answers, which the operator of a page may collect, as rows for fine-tuning.

The folder has `ratings.jsonl`, a log with the latest state of each rated answer last. From it `answers.jsonl`, rows of
good and corrected answers for glm train, and `preferences.jsonl`, rows for preference tuning, are written each time.
"""

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from entrypoints.checkpoint.atomic_files import exclusive_lock
from entrypoints.errors import UserError
from entrypoints.file_writing import replace_text
from entrypoints.web.client import Message
from entrypoints.web.conversation import ROOT, Conversation, Node

LOG, ANSWERS, PREFERENCES = "ratings.jsonl", "answers.jsonl", "preferences.jsonl"

Record = dict[str, Any]


class FeedbackFile:
    """The folder of the collected feedback. Raises UserError if it cannot be written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / LOG).open("a").close()
        except OSError as error:
            raise UserError(
                f"--feedback-dir {folder} cannot be written ({error})", "name a folder that this user may write"
            ) from error

    def add(self, conversation: Conversation, node: Node) -> None:
        """Record the rating and the correction of an answer, with the messages before it."""
        record = {
            "id": f"{conversation.id}.{node.id}",
            "question": f"{conversation.id}.{node.parent}",
            "time": time.time(),
            "model": node.model,
            "rating": node.rating,
            "answer": node.message["content"],
            "correction": node.correction,
            "messages": _messages_before(conversation, node),
        }
        with exclusive_lock(self.folder / ".lock"):
            with (self.folder / LOG).open("a", encoding="utf-8") as stream:
                stream.write(_line(record))
            records = list(_latest(self.folder / LOG))
            replace_text(self.folder / ANSWERS, "".join(map(_line, answer_rows(records))))
            replace_text(self.folder / PREFERENCES, "".join(map(_line, preference_rows(records))))


def answer_rows(records: Iterable[Record]) -> Iterator[Record]:
    """Rows of messages for fine-tuning: answers that were corrected or rated as good; earlier answers are only read."""
    for record in records:
        if good := _good_answer(record):
            before = [_only_read(message) for message in record["messages"]]
            yield {"messages": [*before, {"role": "assistant", "content": good}]}


def preference_rows(records: Iterable[Record]) -> Iterator[Record]:
    """Rows of prompt, chosen and rejected: a correction against its answer, a good answer against bad ones."""
    by_question: dict[str, list[Record]] = {}
    for record in records:
        by_question.setdefault(record["question"], []).append(record)
    for versions in by_question.values():
        for better in versions:
            good = _good_answer(better)
            bad = [each["answer"] for each in versions if each["rating"] == -1 and each["id"] != better["id"]]
            if better["correction"]:
                bad.append(better["answer"])
            for rejected in dict.fromkeys(bad):
                if good and rejected.strip() and rejected != good:
                    yield {
                        "prompt": better["messages"],
                        "chosen": [{"role": "assistant", "content": good}],
                        "rejected": [{"role": "assistant", "content": rejected}],
                    }


def _only_read(message: Record) -> Record:
    return {**message, "weight": 0} if message["role"] == "assistant" else message


def _good_answer(record: Record) -> str | None:
    good: str | None = record["correction"] or (record["answer"] if record["rating"] == 1 else None)
    return good


def _messages_before(conversation: Conversation, node: Node) -> list[Message]:
    """The system prompt of the answer and the messages of its prompt."""
    before = Conversation(nodes=conversation.nodes, leaves=[node.parent]).prompt() if node.parent != ROOT else []
    return [*([Message(role="system", content=node.system)] if node.system.strip() else []), *before]


def _latest(log: Path) -> Iterator[Record]:
    """The last record of each answer; a damaged line is ignored."""
    records: dict[str, Record] = {}
    with log.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            try:
                record = json.loads(line)
                records[record["id"]] = record
            except (ValueError, KeyError, TypeError):
                continue
    yield from records.values()


def _line(value: Record) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
