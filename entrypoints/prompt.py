"""The chat format: messages to token ids, the loss mask beside them, and the same format as a Jinja template.

A prompt is never a string here. Each role tag is one id, and each header and body is encoded in a call of its own,
so no text that a user, a tool or a data row holds can become a role tag. Reading the model's answer is `answer.py`.
Source of the format: ChatGLM3's tokenizer (`build_chat_input`, `build_single_message`) and, for `round`, ChatGLM2's.
"""

import bisect
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from entrypoints.errors import UserError

ROLES = ("system", "user", "assistant", "observation")
# In the order of their ids, which follow the vocabulary's last piece. `sop` and `eop` get brackets in tokenizer.json:
# as bare words they would match inside "people" wherever another program splits text by its special tokens.
CONTROL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *(f"<|{role}|>" for role in ROLES))
ANSWER_ENDS = ("<|user|>", "<|observation|>")  # the control tokens that stop a model, beside </s>
IGNORED = -100  # the label that torch's cross entropy leaves out
TEMPLATES = ("chatglm3", "round")
TOOLS_INTRODUCTION = "Answer the following questions as best as you can. You have access to the following tools:"


class TextCodec(Protocol):
    """What the format needs of a tokenizer."""

    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, none of them a control id."""

    def control(self, name: str) -> int:
        """Id of one of CONTROL_TOKENS."""


@dataclass(frozen=True)
class Message:
    """One turn; `metadata` is a tool's name (assistant), `tools` the tool definitions (system)."""

    role: str
    content: str
    metadata: str = ""
    tools: tuple = ()


def as_messages(turns: Iterable) -> list[Message]:
    """Accept dicts, Messages or ChatGLM2's (question, answer) pairs.

    Raises UserError with the index of the first turn that is none of these.
    """
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        if isinstance(turn, Message):
            messages.append(turn)
        elif isinstance(turn, dict):
            messages.append(from_dict(turn, index))
        elif isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
            messages += [Message("user", turn[0]), Message("assistant", turn[1])]
        else:
            raise UserError(
                f"turn {index} of the history is {type(turn).__name__} {str(turn)[:40]!r}",
                'give {"role": ..., "content": ...} or a (question, answer) pair',
            )
    return messages


def from_dict(turn: dict, index: int) -> Message:
    """A turn in ChatGLM3's own form; raises UserError with its index and all that is wrong with it."""
    unknown = sorted(set(turn) - {"role", "content", "metadata", "tools"})
    problems = [f"has an unknown field {unknown[0]!r}"] if unknown else []
    if turn.get("role") not in ROLES:
        problems.append(f"has role {turn.get('role')!r}")
    if not isinstance(turn.get("content"), str):
        problems.append("has no text as content")
    if not isinstance(turn.get("metadata") or "", str):
        problems.append("has a metadata that is no text")
    if turn.get("tools") and not (turn.get("role") == "system" and isinstance(turn["tools"], list | tuple)):
        problems.append("has tools that are no list on a system turn")
    if problems:
        raise UserError(f"turn {index} {', '.join(problems)}", f"roles are {', '.join(ROLES)}; content is a string")
    return Message(turn["role"], turn["content"], turn.get("metadata") or "", tuple(turn.get("tools") or ()))


@dataclass(frozen=True)
class TrainingRow:
    """One row ready to train on; `ids` and `labels` have the same length, labels are ids or IGNORED."""

    ids: list[int]
    labels: list[int]
    source_cut: bool
    target_cut: bool


@dataclass(frozen=True)
class PromptFormat:
    """How a checkpoint was taught to be asked; stored beside its weights and used by everything that loads it.

    template: `chatglm3` (role tags) or `round` (the text `[Round n]`, `问：`, `答：` of ChatGLM2 and the tutorial).
    source_prefix: text put in front of each question (`chatglm3`) or of the whole prompt (`round`).
    """

    template: str = "chatglm3"
    source_prefix: str = ""

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise UserError(f"unknown prompt template {self.template!r}", f"use one of {', '.join(TEMPLATES)}")

    def encode(self, messages: Iterable, codec: TextCodec) -> list[int]:
        """Ids of a prompt that the model continues with its answer.

        Raises UserError when the last turn is not a user's or an observation, or the template lacks a role.
        """
        turns = as_messages(messages)
        if not turns or turns[-1].role not in ("user", "observation"):
            raise UserError("the conversation has no question at its end", "end it with a user or an observation turn")
        return self._frame(turns, codec)[0]

    def encode_for_training(
        self, messages: Iterable, codec: TextCodec, max_source_length: int, max_target_length: int
    ) -> TrainingRow:
        """Prompt, last answer and end id, with every answer as label.

        max_source_length counts the prompt's ids with its frame, max_target_length the last answer's without the end
        id. Too long a prompt loses whole oldest turns, then the end of its last question; too long an answer loses
        its end. The frame and the end id always stay, and no character is cut in two.
        Raises UserError when the limits do not even hold the frame, or the row does not end with an answer.
        """
        turns = as_messages(messages)
        if len(turns) < 2 or turns[-1].role != "assistant":
            raise UserError("the row does not end with an answer", "give it a response")
        answer = turns.pop()
        question, source_cut = self.cut(turns, codec, max_source_length)
        ids, taught = self._frame(question, codec)
        target, target_cut = self._answer(answer, codec, max_target_length)
        labels = [id_ if learn else IGNORED for id_, learn in zip(ids, taught, strict=True)]
        target.append(codec.eos_id)
        return TrainingRow(ids + target, labels + target, source_cut, target_cut)

    def fit(self, messages: Iterable, codec: TextCodec, room: int) -> tuple[list[Message], int]:
        """The conversation without as many oldest turns as leave a prompt of `room` ids; and how many went.

        The system turn and the last question always stay. Raises UserError, with both numbers, if these do not fit.
        """
        turns = as_messages(messages)
        kept = _newest(turns, lambda candidate: len(self._frame(candidate, codec)[0]) <= room)
        if (length := len(self._frame(kept, codec)[0])) > room:
            raise UserError(
                f"the prompt has {length} tokens and {room} fit", "shorten the question or allow fewer new tokens"
            )
        return kept, len(turns) - len(kept)

    def chat_template(self) -> str:
        """The same format for programs that render Jinja text and split it at the special tokens of tokenizer.json.

        It refuses a text that holds a control token's letters: written as a string, that text would forge a role.
        """
        control = json.dumps(CONTROL_TOKENS)
        prefix = json.dumps(self.source_prefix, ensure_ascii=False)
        body = _CHATGLM3_JINJA if self.template == "chatglm3" else _ROUND_JINJA
        introduction = json.dumps(TOOLS_INTRODUCTION)
        guarded = _GUARD_JINJA.replace("CONTROL", control) + body.replace("INTRODUCTION", introduction)
        return guarded.replace("PREFIX", prefix)  # last: it may hold any text

    def _frame(self, turns: Sequence[Message], codec: TextCodec) -> tuple[list[int], list[bool]]:
        """Ids of a prompt and, for each, whether it is taught (it belongs to or ends an earlier answer)."""
        start = [codec.control("[gMASK]"), codec.control("<sop>")]
        if self.template == "round":
            ids = start + codec.encode(self._round_text(turns))
            return ids, [False] * len(ids)
        ids, taught = start, [False, False]
        for turn in turns:
            prefix = self.source_prefix if turn.role == "user" else ""
            body = codec.encode(f"{turn.metadata}\n") + codec.encode(prefix + with_tools(turn))
            # the id after an answer, the next role's tag, is what teaches the model to stop
            ids_of_turn, ends_answer = [codec.control(f"<|{turn.role}|>"), *body], len(taught) > 2 and taught[-1]
            ids += ids_of_turn
            taught += [ends_answer] + [turn.role == "assistant"] * len(body)
        return [*ids, codec.control("<|assistant|>")], [*taught, False]

    def _answer(self, answer: Message, codec: TextCodec, room: int) -> tuple[list[int], bool]:
        header = codec.encode(f"{answer.metadata}\n") if self.template == "chatglm3" else []
        if len(header) >= room:
            raise UserError(
                f"max_target_length {room} does not hold the answer's header", f"use at least {len(header) + 1}"
            )
        text = _longest(answer.content, lambda text: len(header) + len(codec.encode(text)) <= room)
        return header + codec.encode(text), text != answer.content

    def cut(self, turns: list[Message], codec: TextCodec, room: int) -> tuple[list[Message], bool]:
        """The turns of a prompt cut to `room` ids, and whether anything went: oldest turns, then the question's end.

        Raises UserError when the frame alone has more ids.
        """

        def length(candidate: list[Message]) -> int:
            return len(self._frame(candidate, codec)[0])

        kept = _newest(turns, lambda candidate: length(candidate) <= room)
        if length(kept) <= room:
            return kept, len(kept) < len(turns)
        *before, question = kept

        def asking(text: str) -> list[Message]:
            return [*before, replace(question, content=text)]

        if (frame := length(asking(""))) > room:
            raise UserError(f"max_source_length {room} does not hold the prompt's frame", f"use at least {frame}")
        return asking(_longest(question.content, lambda text: length(asking(text)) <= room)), True

    def _round_text(self, turns: Sequence[Message]) -> str:
        text, number = self.source_prefix, 0
        for turn in turns:
            if turn.role == "user":
                number += 1
                text += f"[Round {number}]\n\n问：{turn.content}\n\n答："
            elif turn.role == "assistant" and number:
                text += f"{turn.content}\n\n"
            else:
                raise UserError(f"the template `round` has no {turn.role} turn", "use user and assistant turns alone")
        return text


def with_tools(turn: Message) -> str:
    """The text of a turn with the tools below it, as it is encoded."""
    if not turn.tools:
        return turn.content
    return f"{turn.content}\n{json.dumps(list(turn.tools), indent=4, ensure_ascii=False)}"


def _newest(turns: list[Message], fits: Callable[[list[Message]], bool]) -> list[Message]:
    """Drop the oldest questions, with all that answers them, until it fits or only the last question is left."""
    if fits(turns):
        return turns
    questions = [index for index, turn in enumerate(turns) if turn.role == "user"]
    candidates = [turns[: questions[0]] + turns[start:] for start in questions[1:]] or [turns]
    return candidates[bisect.bisect_left(candidates, True, hi=len(candidates) - 1, key=fits)]


def _longest(text: str, fits: Callable[[str], bool]) -> str:
    """The longest beginning of `text`, in whole characters, that fits; the empty text always does."""
    if fits(text):
        return text
    low, high = 0, len(text) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(text[:middle]) else (low, middle - 1)
    return text[:low]


# The tokenizer puts the SentencePiece dummy prefix in front of each stretch between special tokens, so a header has its
# own; the one of the body is the blank written after the header's newline.
_GUARD_JINJA = """\
{%- for token in CONTROL %}{% if token in PREFIX ~ '\\n' ~ (tools | tojson if tools else '') -%}
{{ raise_exception('the tools or the source prefix hold the letters of a control token; encode token ids instead') }}
{%- endif %}{% endfor -%}
{%- for message in messages %}{% set number = loop.index0 -%}
{%- set called = (message.metadata or '') ~ '\\n' ~ (message.tools | tojson if message.tools else '') -%}
{%- for token in CONTROL %}{% if token in (message.content or '') ~ '\\n' ~ called -%}
{{ raise_exception('turn ' ~ number ~ ' holds the letters of a control token; encode it with token ids instead') }}
{%- endif %}{% endfor %}{% endfor -%}
"""
_CHATGLM3_JINJA = """\
[gMASK]<sop>
{%- if tools and not (messages and messages[0].role == 'system') -%}
<|system|>{{ '\\n ' ~ INTRODUCTION ~ '\\n' ~ (tools | tojson(indent=4)) }}
{%- endif -%}
{%- for message in messages -%}
{%- set body = (PREFIX if message.role == 'user' else '') ~ (message.content or '') -%}
{%- set offered = message.tools or (tools if message.role == 'system' and loop.first else none) -%}
{%- if offered %}{% set body = body ~ '\\n' ~ (offered | tojson(indent=4)) %}{% endif -%}
<|{{ message.role }}|>{{ (message.metadata or '') ~ '\\n' ~ (' ' ~ body if body else '') }}
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% endif -%}
"""
_ROUND_JINJA = """\
{%- set rounds = namespace(number=0) -%}
[gMASK]<sop>{{ PREFIX }}
{%- for message in messages -%}
{%- if message.role == 'user' %}{% set rounds.number = rounds.number + 1 -%}
{{ '[Round ' ~ rounds.number ~ ']\\n\\n问：' ~ message.content ~ '\\n\\n答：' }}
{%- elif message.role == 'assistant' %}{{ message.content ~ '\\n\\n' }}
{%- else %}{{ raise_exception('the template `round` has no ' ~ message.role ~ ' turn') }}{% endif -%}
{%- endfor -%}
"""
