"""Preference rows: a conversation with a chosen and a rejected answer, in the shapes of Alpaca, ShareGPT and TRL."""

from dataclasses import replace
from typing import Any

from entrypoints.chat_format.openai_messages import is_empty
from entrypoints.chat_format.prompt import split_answer
from entrypoints.dataset.conversations import Message, as_messages, parsed
from entrypoints.dataset.examples import MISSING, Example, RowConverter, SkippedRow, is_messages, text_problem
from entrypoints.dataset.json_stream import Row
from entrypoints.dataset.shapes import Shape
from entrypoints.errors import UserError

MESSAGE_FORMS = ({"role", "content"}, {"from", "value"}, {"role", "tool_calls"})  # an answer that is JSON is a text


class PreferenceConverter(RowConverter):
    """Converts the rows of a shape with two answers: each answer makes a conversation, which is read as other rows."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._answers = (self._response, shape.rejected or "")

    def _example(self, row: Row, index: int) -> Example | SkippedRow:
        answers = [self._turns_or_text(row.fields, name, "assistant") for name in self._answers]
        question = self._asked(row.fields, needed=not all(map(_is_whole, answers)))
        found = []
        for name, answer in zip(self._answers, answers, strict=True):
            messages = self._whole(name, answer, question) if _is_whole(answer) else [*question, *answer]
            example = self._conversation(row, index, messages)
            if isinstance(example, SkippedRow):
                return replace(example, reason=f"{name}: {example.reason}")
            found.append(example)
        chosen, rejected = found
        return self._pair_of(chosen, rejected)

    def _pair_of(self, chosen: Example, rejected: Example) -> Example:
        """One example with both answers; only they are compared, so the answers before them are not learned."""
        (before, better), (other, worse) = split_answer(chosen.turns), split_answer(rejected.turns)
        names = " and ".join(self._answers)
        if before != other:
            raise UserError(f"{names} do not follow the same turns", "")
        if better == worse:
            raise UserError(f"{names} are equal", "")
        read = [replace(turn, learn=False) if turn.role == "assistant" else turn for turn in before]
        return replace(chosen, turns=[*read, *better], rejected=worse)

    def _asked(self, fields: dict[str, Any], needed: bool) -> list[Message]:
        """The messages before the answers; needed: they are not in the answers."""
        shape = self.shape
        column = shape.conversations or shape.prompt
        if not needed:
            self._count_unused(fields, shape.history, shape.input)
        if column is None or (not needed and is_empty(fields.get(column))):
            return []
        if shape.conversations is not None:
            return self._turns(fields)
        turns = self._turns_or_text(fields, column, "user")
        if not needed:
            return turns
        if len(turns) == 1 and turns[0]["role"] == "user" and isinstance(turns[0]["content"], str):
            return self._question(turns[0]["content"], fields)
        self._count_unused(fields, shape.input)
        return [*self._earlier(fields), *turns]

    def _whole(self, name: str, answer: list[Message], question: list[Message]) -> list[Message]:
        """An answer that holds its conversation, of which the question, if there is one beside it, is a part."""
        if question and question[-1].get("content") not in [message.get("content") for message in answer]:
            column = self.shape.conversations or self.shape.prompt
            raise UserError(f"column {column!r} is not part of the conversation in {name}", "")
        return answer

    def _turns_or_text(self, fields: dict[str, Any], column: str, role: str) -> list[Message]:
        """The messages of a text, a message or a list of messages."""
        text = fields.get(column, MISSING)
        value = parsed(text)
        value = [value] if isinstance(value, dict) else value
        if is_messages(value) and any(form <= value[0].keys() for form in MESSAGE_FORMS):
            return as_messages(value, column, self.unused)
        if not isinstance(text, str) or not text.strip():
            raise UserError(text_problem(text, column, column), "")
        return [{"role": role, "content": text}]

    def _count_unused(self, fields: dict[str, Any], *columns: str | None) -> None:
        for column in columns:
            if column is not None and not is_empty(fields.get(column)):
                self.unused[column] += 1


def _is_whole(messages: list[Message]) -> bool:
    """Whether an answer is a conversation with the question in it."""
    return messages[0].get("role") != "assistant"
