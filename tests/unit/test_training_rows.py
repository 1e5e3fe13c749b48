"""Rows to train on: PromptFormat.encode_for_training. Trap names (A7, F8, G1, G2) are those of the reported pains."""

import pytest

from entrypoints.answer import decode
from entrypoints.errors import UserError
from entrypoints.prompt import CONTROL_TOKENS, IGNORED, Message, PromptFormat

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


def targets(row, codec):
    """What the labels say, tags written out, without blanks and newlines."""
    names = {codec.control(name): name.encode() for name in CONTROL_TOKENS} | {codec.eos_id: b"</s>"}
    taught = [label for label in row.labels if label != IGNORED]
    return "".join(b"".join(names.get(id_) or codec.piece(id_) for id_ in taught).decode().split())


def test_every_answer_and_the_id_that_ends_it_is_taught_and_nothing_else(toy_tokenizer):
    """G2: the tag after an answer is what teaches the model to stop."""
    row = FORMAT.encode_for_training(SHORT, toy_tokenizer, 64, 64)
    assert targets(row, toy_tokenizer) == "乙<|user|>丁</s>"


def test_a_tool_call_is_taught_with_its_name_and_the_result_is_not(toy_tokenizer):
    """F7."""
    row = FORMAT.encode_for_training(TOOL_ROW, toy_tokenizer, 512, 64)
    call = "get_weather```pythontool_call(city='北京')```"
    assert targets(row, toy_tokenizer) == f"{call}<|observation|>北京31度</s>"


def test_the_round_template_teaches_the_last_answer_alone(toy_tokenizer):
    """As the tutorial's main.py: the earlier rounds are prompt."""
    row = ROUND.encode_for_training(SHORT, toy_tokenizer, 128, 64)
    assert targets(row, toy_tokenizer) == "丁</s>"


@pytest.mark.parametrize("prompt_format", [FORMAT, ROUND, PromptFormat(source_prefix="写广告：")])
@pytest.mark.parametrize("messages", [SHORT, SHORT[:2]])
def test_a_row_begins_with_the_ids_that_serving_asks_with(prompt_format, messages, toy_tokenizer):
    """F8."""
    row = prompt_format.encode_for_training(messages, toy_tokenizer, 128, 64)
    prompt = prompt_format.encode(messages[:-1], toy_tokenizer)
    assert row.ids[: len(prompt)] == prompt
    assert (row.source_cut, row.target_cut) == (False, False)


@pytest.mark.parametrize("prompt_format", [FORMAT, ROUND, PromptFormat(source_prefix="写广告：")])
@pytest.mark.parametrize("messages", [SHORT, LONG, SHORT + LONG])
def test_a_label_is_its_own_id_or_ignored(prompt_format, messages, toy_tokenizer):
    row = prompt_format.encode_for_training(messages, toy_tokenizer, 64, 64)
    assert all(label in (id_, IGNORED) for id_, label in zip(row.ids, row.labels, strict=True))


def test_too_long_a_row_keeps_its_frame_and_its_end_id(toy_tokenizer):
    """G1: 5,000 characters each, limits 64 and 64."""
    row = FORMAT.encode_for_training(LONG, toy_tokenizer, 64, 64)
    tag = toy_tokenizer.control
    assert row.ids[:3] == [tag("[gMASK]"), tag("<sop>"), tag("<|user|>")]
    prompt_length = row.ids.index(tag("<|assistant|>")) + 1
    assert (row.source_cut, row.target_cut) == (True, True)
    assert prompt_length <= 64
    assert row.ids[-1] == row.labels[-1] == toy_tokenizer.eos_id
    assert 0 < sum(label != IGNORED for label in row.labels) <= 64 + 1
    assert set(decode(row.ids, toy_tokenizer)) <= set("裙美\n ")


def test_a_cut_takes_all_the_room_there_is(toy_tokenizer):
    """裙 is a piece of its own or of three bytes: what is left over is less than one more character."""
    width = len(toy_tokenizer.encode("裙" * 10)) - len(toy_tokenizer.encode("裙" * 9))
    prompt = (
        FORMAT.encode_for_training(LONG, toy_tokenizer, 64, 64).ids.index(toy_tokenizer.control("<|assistant|>")) + 1
    )
    assert 64 - width < prompt <= 64


def test_the_round_prompt_keeps_its_answer_cue_when_cut(toy_tokenizer):
    row = ROUND.encode_for_training(LONG, toy_tokenizer, 64, 64)
    prompt = row.ids[: row.labels.index(next(label for label in row.labels if label != IGNORED))]
    assert len(prompt) <= 64
    assert decode(prompt, toy_tokenizer).startswith("[Round 1]\n\n问：裙")
    assert decode(prompt, toy_tokenizer).endswith("\n\n答：")


def test_an_emoji_is_kept_whole_or_not_at_all_by_a_cut(toy_tokenizer):
    emoji = [Message("user", "👋" * 50), Message("assistant", "👋" * 50)]
    for room in range(12, 24):
        row = FORMAT.encode_for_training(emoji, toy_tokenizer, room, room)
        assert set(decode(row.ids, toy_tokenizer)) <= set("👋\n ")


def test_oldest_turns_go_before_the_question_is_cut(toy_tokenizer):
    system = Message("system", "用中文")
    row = FORMAT.encode_for_training([system, *SHORT], toy_tokenizer, 26, 64)
    prompt = FORMAT.encode([system, SHORT[2]], toy_tokenizer)
    assert len(prompt) <= 26 < len(FORMAT.encode([system, *SHORT[:3]], toy_tokenizer))
    assert row.ids[: len(prompt)] == prompt
    assert row.source_cut


@pytest.mark.parametrize("prompt_format", [FORMAT, ROUND])
def test_limits_that_do_not_hold_the_frame_are_refused_with_the_least_that_would(prompt_format, toy_tokenizer):
    frame = len(prompt_format.encode([Message("user", "")], toy_tokenizer))
    with pytest.raises(UserError, match=f"max_source_length {frame - 1} .*use at least {frame}"):
        prompt_format.encode_for_training(LONG, toy_tokenizer, frame - 1, 64)
    row = prompt_format.encode_for_training(LONG, toy_tokenizer, frame, 64)
    assert row.ids[:frame] == prompt_format.encode([Message("user", "")], toy_tokenizer)


def test_a_target_limit_that_does_not_hold_the_answers_header_is_refused(toy_tokenizer):
    header = len(toy_tokenizer.encode("\n"))
    with pytest.raises(UserError, match=f"max_target_length {header} .*use at least {header + 1}"):
        FORMAT.encode_for_training(SHORT, toy_tokenizer, 64, header)


@pytest.mark.parametrize("messages", [[], SHORT[:1], SHORT[:3], SHORT[1:2]])
def test_a_row_without_an_answer_at_its_end_is_refused(messages, toy_tokenizer):
    with pytest.raises(UserError, match="does not end with an answer"):
        FORMAT.encode_for_training(messages, toy_tokenizer, 64, 64)


class Zeros:
    """A vocabulary that knows no character, as one without byte pieces: every one of them is the unknown id, 0."""

    eos_id = 2

    def encode(self, text):
        return [0] * len(text)

    def control(self, name):
        return 100 + CONTROL_TOKENS.index(name)


def test_a_label_whose_id_is_that_of_padding_stays():
    """A7: pad and unknown share the id 0; labels come from lengths."""
    row = FORMAT.encode_for_training(SHORT[:2], Zeros(), 64, 64)
    assert row.labels == [IGNORED] * 6 + [0, 0, 2]
