"""Texts, prompts and training rows compared with the reference code; see README.md of the golden folder."""

import json

import jinja2
import pytest
import transformers

from entrypoints.chat_format.answer_parser import decode
from entrypoints.chat_format.prompt import IGNORE_INDEX, Message, PromptFormat, as_messages
from entrypoints.checkpoint.tokenizer import load_tokenizer
from entrypoints.families import CHATGLM3

FORMAT, ROUND = PromptFormat(), PromptFormat("round")
SYSTEM = (
    "You are ChatGLM3, a large language model trained by Zhipu.AI. Follow the user's instructions carefully."
    " Respond using markdown."
)
# zai-org/ChatGLM3#127: default system prompt, 你好, the greeting below, 你是谁
ISSUE_127 = """
64790 64792 64794 30910 13 809 383 22011 10461 30944 30966 30932 260 1796 3239 2092 7594 422 1192 899 30923 30930 23833
30930 5741 267 2795 30953 30917 8417 7724 30930 21911 1227 3478 3536 30930 64795 30910 13 36474 54591 64796 30910 13
36474 54591 243 162 148 142 31404 33030 30942 1960 10461 30944 30966 31123 48895 35214 54622 31123 32616 39905 31901
31639 31155 64795 30910 13 30910 34607 55622 64796
"""


@pytest.fixture(scope="module")
def tokenizer(golden_native):
    return load_tokenizer(golden_native)


@pytest.fixture(scope="module")
def other_program(golden_native):
    """The tokenizer as another program loads it."""
    return transformers.AutoTokenizer.from_pretrained(golden_native, local_files_only=True)


def rows(file, count):
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(found) == count
    return found


def contains_a_special_token_name(text):
    return any(token in text for token in (*CHATGLM3.special_tokens, "</s>", "<unk>"))


def test_the_ids_are_those_that_public_issues_name(tokenizer):
    """ChatGLM2-6B#173, ChatGLM3#127, FastChat#2845."""
    assert [tokenizer.special_token_id(name) for name in CHATGLM3.special_tokens] == list(range(64789, 64798))
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_ids) == (2, 0, (2, 64795, 64797))
    assert tokenizer.size == 64798
    assert tokenizer.encode("\n") == [30910, 13]


def test_the_prompt_of_issue_127_has_its_ids(tokenizer):
    greeting = "你好👋！我是ChatGLM3，很高兴见到你，欢迎问我任何问题。"
    messages = [
        Message("system", SYSTEM),
        Message("user", "你好"),
        Message("assistant", greeting),
        Message("user", "你是谁"),
    ]
    assert FORMAT.encode(messages, tokenizer) == [int(id_) for id_ in ISSUE_127.split()]


def test_ids_without_text_decode_to_nothing(tokenizer):
    """Ids 64798 to 65023 have no piece, and labels contain -100."""
    assert decode([36474, 54591, 65000, -100, 2], tokenizer) == "你好"


def test_all_texts_have_the_reference_ids(golden, tokenizer):
    texts = rows(golden / "text_ids.jsonl", 3453)
    assert [row["text"] for row in texts if tokenizer.encode(row["text"]) != row["ids"]] == []


def test_all_ids_have_the_reference_text(golden, tokenizer):
    texts = rows(golden / "text_ids.jsonl", 3453)
    assert [row["text"] for row in texts if decode(row["ids"], tokenizer) != row["decoded"]] == []


def test_plain_transformers_gives_all_texts_the_reference_ids(golden, other_program):
    """6 texts contain the name of a special token, which plain transformers encodes as that token."""
    texts = [row for row in rows(golden / "text_ids.jsonl", 3453) if not contains_a_special_token_name(row["text"])]
    assert len(texts) == 3447
    wrong = [
        row["text"] for row in texts if other_program(row["text"], add_special_tokens=False).input_ids != row["ids"]
    ]
    assert wrong == []


def test_all_conversations_have_the_reference_ids(golden, tokenizer):
    chats = rows(golden / "chat_ids.jsonl", 44)
    assert [chat["messages"] for chat in chats if FORMAT.encode(chat["messages"], tokenizer) != chat["ids"]] == []


def test_the_chat_template_gives_the_reference_ids_or_rejects_names_of_special_tokens(golden, other_program):
    rejected = 0
    for chat in rows(golden / "chat_ids.jsonl", 44):
        options = {"add_generation_prompt": True, "return_dict": False}
        if contains_a_special_token_name("".join(turn["content"] for turn in chat["messages"])):
            rejected += 1
            with pytest.raises(jinja2.TemplateError, match="contains the text of a special token"):
                other_program.apply_chat_template(chat["messages"], **options)
        else:
            assert other_program.apply_chat_template(chat["messages"], **options) == chat["ids"]
    assert rejected == 2


def turns_of(row):
    return [*as_messages(row["history"]), Message("user", row["content"]), Message("assistant", row["summary"])]


def expected(row):
    """Ids and labels as the tutorial's main.py joins them: prompt, answer, end id."""
    answer = [*row["answer_ids_uncut"], 2]
    return row["prompt_ids_uncut"] + answer, [IGNORE_INDEX] * len(row["prompt_ids_uncut"]) + answer


def test_all_rounds_have_the_reference_ids_and_labels_uncut(golden, tokenizer):
    for row in rows(golden / "round_ids.jsonl", 120):
        turns = turns_of(row)
        assert ROUND.encode(turns[:-1], tokenizer) == row["prompt_ids_uncut"]
        row_encoded = ROUND.encode_for_training(turns, tokenizer, 10_000, 10_000)
        assert (row_encoded.ids, row_encoded.labels) == expected(row)


def test_rows_within_the_limits_of_the_tutorial_have_its_ids_and_labels(golden, tokenizer):
    kept = [row for row in rows(golden / "round_ids.jsonl", 120) if not row["reference_cuts"]]
    assert len(kept) == 72
    for row in kept:
        limits = row["max_source_length"], row["max_target_length"]
        found = ROUND.encode_for_training(turns_of(row), tokenizer, *limits)
        assert (found.ids, found.labels) == expected(row)
        assert (found.source_truncated, found.target_truncated) == (False, False)


def test_rows_beyond_the_limits_of_the_tutorial_keep_the_prompt_frame_and_the_end(golden, tokenizer):
    """Truncation in the tutorial loses the cue or the end of the answer; here both are kept, within the same limits."""
    cut = [row for row in rows(golden / "round_ids.jsonl", 120) if row["reference_cuts"]]
    assert len(cut) == 48
    for row in cut:
        limits = row["max_source_length"], row["max_target_length"]
        found = ROUND.encode_for_training(turns_of(row), tokenizer, *limits)
        learned = [label for label in found.labels if label != IGNORE_INDEX]
        prompt = found.ids[: -len(learned)]
        assert found.source_truncated or found.target_truncated
        assert len(prompt) <= row["max_source_length"]
        assert len(learned) <= row["max_target_length"] + 1
        assert prompt[:2] == [64790, 64792]
        assert decode(prompt, tokenizer).endswith("\n\n答：")
        assert learned[-1] == 2
