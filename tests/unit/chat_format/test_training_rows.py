"""Training rows: ids, labels and truncation of PromptFormat.encode_for_training."""

import pytest

from entrypoints.chat_format.answer_parser import decode, parse_answer
from entrypoints.chat_format.prompt import IGNORE_INDEX, Message, PromptFormat, split_answer
from entrypoints.chat_format.tool_calls import write_tool_call
from entrypoints.errors import UserError
from entrypoints.families import CHATGLM3

FORMAT, ROUND = PromptFormat(), PromptFormat("round")
LONG = [Message("user", "裙" * 5000), Message("assistant", "美" * 5000)]
SHORT = [Message("user", "甲"), Message("assistant", "乙"), Message("user", "丙"), Message("assistant", "丁")]
TOOL_ROW = [
    Message("system", "查天气", tools=({"name": "get_weather"},)),
    Message("user", "北京"),
    Message("assistant", "```python\ntool_call(city='北京')\n```", "get_weather"),
    Message("observation", "31C"),
    Message("assistant", "北京31度"),
]


def label_text(row, codec):
    """The labels as text, special tokens by name, without blanks and newlines."""
    names = {codec.special_token_id(name): name.encode() for name in CHATGLM3.special_tokens} | {codec.eos_id: b"</s>"}
    labels = [label for label in row.labels if label != IGNORE_INDEX]
    return "".join(b"".join(names.get(id_) or codec.token_bytes(id_) for id_ in labels).decode().split())


def test_labels_are_every_answer_with_the_token_that_ends_it_and_nothing_else(toy_tokenizer):
    """The role tag after an answer teaches the model to stop."""
    row = FORMAT.encode_for_training(SHORT, toy_tokenizer, 64, 64)
    assert label_text(row, toy_tokenizer) == "乙<|user|>丁</s>"


def test_a_tool_call_with_its_name_is_a_label_and_its_result_is_not(toy_tokenizer):
    """The model learns to call tools, not to invent their results."""
    row = FORMAT.encode_for_training(TOOL_ROW, toy_tokenizer, 512, 64)
    call = "get_weather```pythontool_call(city='北京')```"
    assert label_text(row, toy_tokenizer) == f"{call}<|observation|>北京31度</s>"


CALL = write_tool_call({"city": "北京"})
ENDS = [  # turns of conversations in which an answer is followed by something else than a question
    "user assistant system user assistant",
    "user assistant assistant user assistant",
    "user assistant call:f observation assistant",
    "user call:f call:g observation observation assistant",
    "user call:f system observation assistant call:g",
    "user assistant call:f call:g",
]


def conversation(words):
    """One turn for each word: a role, or call:NAME."""
    turns = []
    for number, word in enumerate(words.split()):
        role, _, name = word.partition(":")
        turns.append(Message("assistant", CALL, name) if name else Message(role, f"第{number}句"))
    return turns


def answers_of(messages):
    """The answers of a conversation as served, each [text, [called tools]]: a call joins the answer before it."""
    found, before = [], None
    for message in messages:
        if message.role == "assistant":
            if before != "assistant" or not message.metadata:
                found.append(["", []])
            found[-1][1].append(message.metadata) if message.metadata else found[-1].__setitem__(0, message.content)
        before = message.role
    return found


@pytest.mark.parametrize("words", ENDS)
def test_every_learned_end_is_an_id_at_which_serving_stops(words, toy_tokenizer):
    """Cut at these ids, the labels are the answers that the server would return for them, complete and alone."""
    messages = conversation(words)
    row = FORMAT.encode_for_training(messages, toy_tokenizer, 512, 512)
    generated, current = [], []
    for label in (label for label in row.labels if label != IGNORE_INDEX):
        if label in toy_tokenizer.stop_ids:
            generated.append(current)
            current = []
        else:
            current.append(label)
    assert current == [], "the row ends with a stop id"
    served = [parse_answer(ids, toy_tokenizer, ("f", "g")) for ids in generated]
    assert [[answer.content, [call.name for call in answer.tool_calls]] for answer in served] == answers_of(messages)


@pytest.mark.parametrize("words", ENDS)
def test_the_ids_of_a_row_are_those_of_its_prompt_whatever_its_labels_are(words, toy_tokenizer):
    messages = conversation(words)
    row = FORMAT.encode_for_training(messages, toy_tokenizer, 512, 512)
    before, answer = split_answer(messages)
    assert before + answer == messages
    prompt = FORMAT.encode([*messages, Message("user", "")], toy_tokenizer)
    assert row.ids[:-1] == prompt[: len(row.ids) - 1]


def test_an_answer_that_is_only_read_has_no_labels(toy_tokenizer):
    """`weight: 0` of OpenAI, `loss: false` of ChatGLM3."""
    read = [
        Message("user", "甲"),
        Message("assistant", "乙", learn=False),
        Message("user", "丙"),
        Message("assistant", "丁"),
    ]
    assert label_text(FORMAT.encode_for_training(read, toy_tokenizer, 64, 64), toy_tokenizer) == "丁</s>"
    last = [*SHORT[:3], Message("assistant", "丁", learn=False)]
    assert label_text(FORMAT.encode_for_training(last, toy_tokenizer, 64, 64), toy_tokenizer) == "乙<|user|>"
    called = [SHORT[0], Message("assistant", "想", learn=False), Message("assistant", CALL, "f")]
    assert label_text(FORMAT.encode_for_training(called, toy_tokenizer, 64, 64), toy_tokenizer).startswith("f```python")


def test_only_the_last_turn_of_an_answer_is_truncated(toy_tokenizer):
    messages = [Message("user", "问"), Message("assistant", "稍等"), Message("assistant", CALL, "f")]
    whole = FORMAT.encode_for_training(messages, toy_tokenizer, 64, 512)
    learned = sum(label != IGNORE_INDEX for label in whole.labels)
    cut = FORMAT.encode_for_training(messages, toy_tokenizer, 64, learned - 4)
    assert (whole.target_truncated, cut.target_truncated) == (False, True)
    assert cut.ids[:-4] == whole.ids[: len(cut.ids) - 4]
    assert cut.ids[-1] == toy_tokenizer.eos_id
    with pytest.raises(UserError, match="--max-target-length 4 does not hold the answer's header"):
        FORMAT.encode_for_training(messages, toy_tokenizer, 64, 4)


def test_the_round_template_rejects_tool_calls(toy_tokenizer):
    """It has no place for the name of the tool."""
    with pytest.raises(UserError, match="the template `round` has no tool call"):
        ROUND.encode_for_training([SHORT[0], Message("assistant", CALL, "f")], toy_tokenizer, 64, 64)
    with pytest.raises(UserError, match="the template `round` has no tool call"):
        ROUND.encode([SHORT[0], Message("assistant", CALL, "f"), SHORT[0]], toy_tokenizer)


def test_the_round_template_has_only_the_last_answer_as_label(toy_tokenizer):
    """As in ChatGLM2's ptuning/main.py: earlier rounds are part of the prompt."""
    row = ROUND.encode_for_training(SHORT, toy_tokenizer, 128, 64)
    assert label_text(row, toy_tokenizer) == "丁</s>"


@pytest.mark.parametrize("prompt_format", [FORMAT, ROUND, PromptFormat(source_prefix="写广告：")])
@pytest.mark.parametrize("messages", [SHORT, SHORT[:2]])
def test_a_training_row_starts_with_the_ids_of_the_prompt_used_for_inference(prompt_format, messages, toy_tokenizer):
    """A model that is trained with one format and queried with another gives poor answers."""
    row = prompt_format.encode_for_training(messages, toy_tokenizer, 128, 64)
    prompt = prompt_format.encode(messages[:-1], toy_tokenizer)
    assert row.ids[: len(prompt)] == prompt
    assert (row.source_truncated, row.target_truncated) == (False, False)


@pytest.mark.parametrize("prompt_format", [FORMAT, ROUND, PromptFormat(source_prefix="写广告：")])
@pytest.mark.parametrize("messages", [SHORT, LONG, SHORT + LONG])
def test_a_label_is_its_own_id_or_the_ignore_index(prompt_format, messages, toy_tokenizer):
    row = prompt_format.encode_for_training(messages, toy_tokenizer, 64, 64)
    assert all(label in (id_, IGNORE_INDEX) for id_, label in zip(row.ids, row.labels, strict=True))


def test_a_truncated_row_keeps_its_role_tags_and_its_end_token(toy_tokenizer):
    """5,000 characters each, limits 64 and 64."""
    row = FORMAT.encode_for_training(LONG, toy_tokenizer, 64, 64)
    tag = toy_tokenizer.special_token_id
    assert row.ids[:3] == [tag("[gMASK]"), tag("<sop>"), tag("<|user|>")]
    prompt_length = row.ids.index(tag("<|assistant|>")) + 1
    assert (row.source_truncated, row.target_truncated) == (True, True)
    assert prompt_length <= 64
    assert row.ids[-1] == row.labels[-1] == toy_tokenizer.eos_id
    assert 0 < sum(label != IGNORE_INDEX for label in row.labels) <= 64 + 1
    assert set(decode(row.ids, toy_tokenizer)) <= set("裙美\n ")


def test_truncation_keeps_as_much_as_fits(toy_tokenizer):
    """裙 is one token or three byte tokens: less than one more character would fit."""
    width = len(toy_tokenizer.encode("裙" * 10)) - len(toy_tokenizer.encode("裙" * 9))
    prompt = (
        FORMAT.encode_for_training(LONG, toy_tokenizer, 64, 64).ids.index(
            toy_tokenizer.special_token_id("<|assistant|>")
        )
        + 1
    )
    assert 64 - width < prompt <= 64


def test_a_truncated_round_prompt_keeps_its_answer_cue(toy_tokenizer):
    row = ROUND.encode_for_training(LONG, toy_tokenizer, 64, 64)
    prompt = row.ids[: row.labels.index(next(label for label in row.labels if label != IGNORE_INDEX))]
    assert len(prompt) <= 64
    assert decode(prompt, toy_tokenizer).startswith("[Round 1]\n\n问：裙")
    assert decode(prompt, toy_tokenizer).endswith("\n\n答：")


def test_truncation_never_splits_an_emoji(toy_tokenizer):
    emoji = [Message("user", "👋" * 50), Message("assistant", "👋" * 50)]
    for room in range(12, 24):
        row = FORMAT.encode_for_training(emoji, toy_tokenizer, room, room)
        assert set(decode(row.ids, toy_tokenizer)) <= set("👋\n ")


def test_oldest_turns_are_dropped_before_the_question_is_truncated(toy_tokenizer):
    system = Message("system", "用中文")
    row = FORMAT.encode_for_training([system, *SHORT], toy_tokenizer, 26, 64)
    prompt = FORMAT.encode([system, SHORT[2]], toy_tokenizer)
    assert len(prompt) <= 26 < len(FORMAT.encode([system, *SHORT[:3]], toy_tokenizer))
    assert row.ids[: len(prompt)] == prompt
    assert row.source_truncated


@pytest.mark.parametrize("prompt_format", [FORMAT, ROUND])
def test_limits_too_small_for_the_role_tags_are_rejected_with_the_minimum(prompt_format, toy_tokenizer):
    minimum = len(prompt_format.encode([Message("user", "")], toy_tokenizer))
    with pytest.raises(UserError, match=f"--max-source-length {minimum - 1} .*use at least {minimum}"):
        prompt_format.encode_for_training(LONG, toy_tokenizer, minimum - 1, 64)
    row = prompt_format.encode_for_training(LONG, toy_tokenizer, minimum, 64)
    assert row.ids[:minimum] == prompt_format.encode([Message("user", "")], toy_tokenizer)


def test_a_target_limit_too_small_for_the_answers_header_is_rejected(toy_tokenizer):
    header = len(toy_tokenizer.encode("\n"))
    with pytest.raises(UserError, match=f"--max-target-length {header} .*use at least {header + 1}"):
        FORMAT.encode_for_training(SHORT, toy_tokenizer, 64, header)


@pytest.mark.parametrize("messages", [[], SHORT[:1], SHORT[:3], SHORT[1:2]])
def test_a_row_that_does_not_end_with_an_answer_is_rejected(messages, toy_tokenizer):
    with pytest.raises(UserError, match="does not end with an answer"):
        FORMAT.encode_for_training(messages, toy_tokenizer, 64, 64)


class Zeros:
    """A vocabulary without byte fallback that knows no character: each one becomes the unknown id, 0."""

    eos_id = 2

    def encode(self, text):
        return [0] * len(text)

    def special_token_id(self, name):
        return 100 + CHATGLM3.special_tokens.index(name)


def test_a_label_with_the_id_of_padding_is_kept():
    """Padding and unknown share the id 0; labels are derived from lengths, not from ids."""
    row = FORMAT.encode_for_training(SHORT[:2], Zeros(), 64, 64)
    assert row.labels == [IGNORE_INDEX] * 6 + [0, 0, 2]
