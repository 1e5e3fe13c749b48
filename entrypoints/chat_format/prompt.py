"""Prompt format: messages to token ids, the loss mask of a training row, and the same format as a Jinja template.

A prompt is never rendered as one string. Each role tag is a single token id, and each header and each body is encoded
separately. Text from a user, a tool or a data row therefore cannot become a role tag. Parsing the answer is
`answer_parser.py`.
Source of the format: ChatGLM3's tokenizer (`build_chat_input`, `build_single_message`) and, for `round`, ChatGLM2's.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from entrypoints.chat_format.jinja_template import build_jinja_template
from entrypoints.chat_format.round_template import round_text
from entrypoints.chat_format.tool_calls import tool_format
from entrypoints.chat_format.truncation import TokenLimitError, drop_oldest_turns, longest_fitting_prefix
from entrypoints.errors import UserError
from entrypoints.families import DEFAULT_FAMILY, FAMILIES, ROLE_TAGS, Family, family_named

ROLES = ("system", "user", "assistant", "observation")
IGNORE_INDEX = -100  # the default `ignore_index` of torch.nn.functional.cross_entropy
TEMPLATES = tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family.templates))


class TokenEncoder(Protocol):
    """The part of a tokenizer that the prompt format uses."""

    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without any special token."""

    def special_token_id(self, name: str) -> int:
        """Id of one special token of the family."""


@dataclass(frozen=True)
class Message:
    """One turn; `metadata` is the name of the called tool (assistant), `tools` the tool definitions (system).

    learn: False for an answer that training only reads.
    """

    role: str
    content: str
    metadata: str = ""
    tools: tuple[Any, ...] = ()
    learn: bool = True


MessageLike = Message | dict[str, Any] | Sequence[str]


def as_messages(turns: Iterable[MessageLike]) -> list[Message]:
    """Accept Messages, dicts in ChatGLM3's form and ChatGLM2's (question, answer) pairs.

    Raises UserError: names the index of the first turn that is not one of these.
    """
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        if isinstance(turn, Message):
            messages.append(turn)
        elif isinstance(turn, dict):
            messages.append(message_from_dict(turn, index))
        elif isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
            messages += [Message("user", turn[0]), Message("assistant", turn[1])]
        else:
            raise UserError(
                f"turn {index} of the history is {type(turn).__name__} {str(turn)[:40]!r}",
                'pass {"role": ..., "content": ...} or a (question, answer) pair',
            )
    return messages


def message_from_dict(turn: dict[str, Any], index: int) -> Message:
    """Convert a turn in ChatGLM3's form.

    Raises UserError: names the index of the turn and everything that is wrong with it.
    """
    unknown = sorted(set(turn) - {"role", "content", "metadata", "tools"})
    problems = [f"has an unknown field {unknown[0]!r}"] if unknown else []
    if turn.get("role") not in ROLES:
        problems.append(f"has role {turn.get('role')!r}")
    if not isinstance(turn.get("content"), str):
        problems.append("has content that is not a string")
    if not isinstance(turn.get("metadata") or "", str):
        problems.append("has metadata that is not a string")
    if turn.get("tools") and not (turn.get("role") == "system" and isinstance(turn["tools"], list | tuple)):
        problems.append("has tools that are not a list on a system turn")
    if problems:
        raise UserError(f"turn {index} {', '.join(problems)}", f"roles are {', '.join(ROLES)}; content is a string")
    return Message(turn["role"], turn["content"], turn.get("metadata") or "", tuple(turn.get("tools") or ()))


@dataclass(frozen=True)
class EncodedExample:
    """One training row; `ids` and `labels` have the same length.

    A label is IGNORE_INDEX or its own id; where the turn after an answer has a role tag at which serving does not
    stop, the label of that tag is the end of an answer.
    """

    ids: list[int]
    labels: list[int]
    source_truncated: bool
    target_truncated: bool


@dataclass(frozen=True)
class PromptFormat:
    """The prompt format that a checkpoint was trained with; stored beside the weights and used by every engine.

    template: `chatglm3` or `glm4` (role tags), or `round` (the text `[Round n]`, `问：`, `答：` of ChatGLM2).
    source_prefix: text before each question (role tags) or before the whole prompt (`round`).
    family: name of the model family, whose special tokens the prompt consists of.
    """

    template: str = "chatglm3"
    source_prefix: str = ""
    family: str = DEFAULT_FAMILY

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise UserError(f"unknown prompt template {self.template!r}", f"use one of {', '.join(TEMPLATES)}")
        family = self._family
        if self.template not in family.templates:
            raise UserError(
                f"{family.title} has no prompt template {self.template!r}", f"use {' or '.join(family.templates)}"
            )

    @property
    def _family(self) -> Family:
        return family_named(self.family)

    @classmethod
    def of(cls, family: Family, template: str | None = None) -> "PromptFormat":
        """The format of a family; template: another one than its own. Raises UserError: it cannot have it."""
        return cls(template or family.templates[0], family=family.name)

    def encode(self, messages: Iterable[MessageLike], codec: TokenEncoder) -> list[int]:
        """Ids of a prompt that the model continues with its answer.

        After an assistant turn it begins another one, as with `add_generation_prompt` of transformers; `round` cannot.
        Raises UserError: the last turn is a system turn or there is none, or the template lacks a role.
        """
        turns = as_messages(messages)
        answered = ("user", "observation") if self.template == "round" else ("user", "observation", "assistant")
        if not turns or turns[-1].role not in answered:
            raise UserError("the conversation does not end with a question", "end it with a user or observation turn")
        return self._encode_prompt(turns, codec)[0]

    def encode_for_training(
        self, messages: Iterable[MessageLike], codec: TokenEncoder, max_source_length: int, max_target_length: int
    ) -> EncodedExample:
        """Prompt, last answer and end token; every answer is a label, except those that are only read.

        The last answer is a text, tool calls, or both. max_source_length limits the tokens of the prompt with its role
        tags, max_target_length those of the last answer without the end token. A prompt that is too long loses whole
        turns, the oldest first, then the end of its last question. An answer that is too long loses its end. Role tags
        and the end token are always kept, and no character is split.
        Raises UserError: the limits do not hold the role tags alone, or the row does not end with an answer.
        """
        before, answer = split_answer(as_messages(messages))
        if not before or not answer:
            raise UserError("the row does not end with an answer", "add a response")
        answer = self._own_turns(answer) or answer
        question, source_truncated = self.truncate(before, codec, max_source_length)
        ids, labels = self._encode_prompt(question, codec)
        last, target_truncated = self._truncate_answer(answer, codec, max_target_length)
        target, target_labels = self._encode_turns([*answer[:-1], last], codec)
        end = self._end_id(last, codec)
        ids += [*target[1:], end]  # the prompt ends with the first tag
        labels += [*target_labels[1:], end if last.learn else IGNORE_INDEX]
        return EncodedExample(ids, labels, source_truncated, target_truncated)

    def fit_to_context(
        self, messages: Iterable[MessageLike], codec: TokenEncoder, max_tokens: int
    ) -> tuple[list[Message], int]:
        """Drop the oldest turns until the prompt has at most `max_tokens`; the kept turns and the number of dropped.

        The system turn and the last question are always kept.
        Raises UserError: these alone are too long; names both lengths.
        """
        turns = as_messages(messages)
        kept = drop_oldest_turns(turns, lambda candidate: len(self._encode_prompt(candidate, codec)[0]) <= max_tokens)
        if (length := len(self._encode_prompt(kept, codec)[0])) > max_tokens:
            raise UserError(
                f"the prompt has {length} tokens and {max_tokens} fit", "shorten the question or allow fewer new tokens"
            )
        return kept, len(turns) - len(kept)

    def truncate(self, turns: list[Message], codec: TokenEncoder, max_tokens: int) -> tuple[list[Message], bool]:
        """The turns of a prompt cut to `max_tokens`, and whether anything was cut.

        Whole turns go first, the oldest first, then the end of the last question.
        Raises TokenLimitError: what is never cut is longer; after tool calls, their question is never cut either.
        """

        def length(candidate: list[Message]) -> int:
            return len(self._encode_prompt(candidate, codec)[0])

        kept = drop_oldest_turns(turns, lambda candidate: length(candidate) <= max_tokens)
        if length(kept) <= max_tokens:
            return kept, len(kept) < len(turns)
        *before, question = kept

        def with_question(text: str) -> list[Message]:
            return [*before, replace(question, content=text)]

        if (shortest := length(with_question(""))) > max_tokens:
            kept_text = "the prompt's system text, tools, tool calls and role tags"
            raise TokenLimitError.of("--max-source-length", max_tokens, shortest, kept_text)
        text = longest_fitting_prefix(question.content, lambda text: length(with_question(text)) <= max_tokens)
        return with_question(text), True

    def chat_template(self) -> str:
        """The same format as a Jinja template, for programs that render text and split it at the special tokens.

        The template rejects text that contains a special token: rendered as a string, it would become a role tag.
        """
        return build_jinja_template(self.template, self.source_prefix, self._family.special_tokens)

    def _encode_prompt(self, turns: Sequence[Message], codec: TokenEncoder) -> tuple[list[int], list[int]]:
        """Ids of a prompt, and the label of each: those of earlier answers and of their ends, else IGNORE_INDEX."""
        turns = self._own_turns(turns)
        start = [codec.special_token_id("[gMASK]"), codec.special_token_id("<sop>")]
        if self.template == "round":
            ids = start + codec.encode(round_text(turns, self.source_prefix))
            return ids, [IGNORE_INDEX] * len(ids)
        ids, labels = self._encode_turns(turns, codec)
        end = self._end_id(turns[-1], codec) if turns and _is_learned(turns[-1]) else IGNORE_INDEX
        return [*start, *ids, codec.special_token_id(ROLE_TAGS[2])], [IGNORE_INDEX] * 2 + [*labels, end]

    def _own_turns(self, turns: Sequence[Message]) -> list[Message]:
        """The turns as the family was trained on them."""
        return tool_format(self._family).own_turns(turns)

    def _end_id(self, answer: Message, codec: TokenEncoder) -> int:
        """The token with which the family ends such an answer."""
        name = self._family.call_end if answer.metadata else self._family.text_end
        return codec.special_token_id(name) if name else codec.eos_id

    def _encode_turns(self, turns: Sequence[Message], codec: TokenEncoder) -> tuple[list[int], list[int]]:
        """Ids and labels of tag, header and body of each turn.

        The tag after an answer is a label too: it teaches the model to stop, or to call a tool in the same answer. At
        another tag serving would not stop, so the label in its place is the end of an answer.
        """
        ids: list[int] = []
        labels: list[int] = []
        before: Message | None = None
        for turn in turns:
            tag, body = self._tag_id(turn, codec), self._encode_body(turn, codec)
            continues = turn.role in ("user", "observation") or bool(turn.metadata)
            end = tag if continues or not before else self._end_id(before, codec)
            ids += [tag, *body]
            labels += [end if before and _is_learned(before) else IGNORE_INDEX]
            labels += body if _is_learned(turn) else [IGNORE_INDEX] * len(body)
            before = turn
        return ids, labels

    def _tag_id(self, turn: Message, codec: TokenEncoder) -> int:
        if self.template == "round":  # only of an answer, whose tag `encode_for_training` removes
            return codec.eos_id
        return codec.special_token_id(f"<|{turn.role}|>")

    def _encode_body(self, turn: Message, codec: TokenEncoder) -> list[int]:
        if self.template == "round":  # of an answer: the other turns are in `round_text`
            return codec.encode(turn.content)
        prefix = self.source_prefix if turn.role == "user" else ""
        return codec.encode(f"{turn.metadata}\n") + codec.encode(prefix + tool_format(self._family).system_text(turn))

    def _truncate_answer(self, answer: Sequence[Message], codec: TokenEncoder, max_tokens: int) -> tuple[Message, bool]:
        """The last turn of an answer, cut so that the answer has at most `max_tokens`, and whether it was cut."""
        if self.template == "round" and any(turn.metadata for turn in answer):
            raise UserError("the template `round` has no tool call", "use only user and assistant turns")
        *whole, last = answer
        empty = [*whole, replace(last, content="")]
        header = sum(1 + len(self._encode_body(turn, codec)) for turn in empty) - 1
        if header >= max_tokens:
            raise TokenLimitError.of("--max-target-length", max_tokens, header + 1, "the answer's header")
        text = longest_fitting_prefix(last.content, lambda text: header + len(codec.encode(text)) <= max_tokens)
        return replace(last, content=text), text != last.content


def split_answer(turns: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """The turns before the last answer, and that answer: one text, tool calls, or a text with its calls."""
    start = len(turns)
    while start and turns[start - 1].role == "assistant" and (start == len(turns) or turns[start].metadata):
        start -= 1
    return list(turns[:start]), list(turns[start:])


def _is_learned(turn: Message) -> bool:
    return turn.role == "assistant" and turn.learn
