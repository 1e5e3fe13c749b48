"""Our texts, prompts and rows against what the reference code computes; see README.md of the golden folder."""

import json

import jinja2
import pytest
import transformers

from entrypoints.answer import decode
from entrypoints.checkpoint.tokenizer import load_tokenizer
from entrypoints.prompt import CONTROL_TOKENS, IGNORED, Message, PromptFormat, as_messages

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
    """How a program that is not ours loads the folder."""
    return transformers.AutoTokenizer.from_pretrained(golden_native, local_files_only=True)


def rows(file, count):
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(found) == count
    return found


def spells_a_special_token(text):
    return any(token in text for token in (*CONTROL_TOKENS, "</s>", "<unk>"))


def test_the_constants_are_those_that_users_and_issues_name(tokenizer):
    """ChatGLM2-6B#173, ChatGLM3#127, FastChat#2845."""
    assert [tokenizer.control(name) for name in CONTROL_TOKENS] == list(range(64789, 64798))
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
    """google/sentencepiece#774 and others: rows 64798..65023 have no piece, labels hold -100."""
    assert decode([36474, 54591, 65000, -100, 2], tokenizer) == "你好"


def test_all_texts_have_the_reference_ids(golden, tokenizer):
    texts = rows(golden / "text_ids.jsonl", 3453)
    assert [row["text"] for row in texts if tokenizer.encode(row["text"]) != row["ids"]] == []


def test_all_ids_have_the_reference_text(golden, tokenizer):
    texts = rows(golden / "text_ids.jsonl", 3453)
    assert [row["text"] for row in texts if decode(row["ids"], tokenizer) != row["decoded"]] == []


def test_plain_transformers_gives_all_texts_the_reference_ids(golden, other_program):
    """6 texts spell a control, end or unknown token, which plain transformers reads as the token."""
    texts = [row for row in rows(golden / "text_ids.jsonl", 3453) if not spells_a_special_token(row["text"])]
    assert len(texts) == 3447
    wrong = [
        row["text"] for row in texts if other_program(row["text"], add_special_tokens=False).input_ids != row["ids"]
    ]
    assert wrong == []


def test_all_conversations_have_the_reference_ids(golden, tokenizer):
    chats = rows(golden / "chat_ids.jsonl", 44)
    assert [chat["messages"] for chat in chats if FORMAT.encode(chat["messages"], tokenizer) != chat["ids"]] == []


def test_the_chat_template_gives_the_reference_ids_or_refuses_control_tokens_in_letters(golden, other_program):
    refused = 0
    for chat in rows(golden / "chat_ids.jsonl", 44):
        ask = {"add_generation_prompt": True, "return_dict": False}
        if spells_a_special_token("".join(turn["content"] for turn in chat["messages"])):
            refused += 1
            with pytest.raises(jinja2.TemplateError, match="letters of a control token"):
                other_program.apply_chat_template(chat["messages"], **ask)
        else:
            assert other_program.apply_chat_template(chat["messages"], **ask) == chat["ids"]
    assert refused == 2


def turns_of(row):
    return [*as_messages(row["history"]), Message("user", row["content"]), Message("assistant", row["summary"])]


def expected(row):
    """Ids and labels as the tutorial's main.py joins them: prompt, answer, end id."""
    answer = [*row["answer_ids_uncut"], 2]
    return row["prompt_ids_uncut"] + answer, [IGNORED] * len(row["prompt_ids_uncut"]) + answer


def test_all_rounds_have_the_reference_ids_and_labels_uncut(golden, tokenizer):
    for row in rows(golden / "round_ids.jsonl", 120):
        turns = turns_of(row)
        assert ROUND.encode(turns[:-1], tokenizer) == row["prompt_ids_uncut"]
        whole = ROUND.encode_for_training(turns, tokenizer, 10_000, 10_000)
        assert (whole.ids, whole.labels) == expected(row)


def test_rows_within_the_tutorials_limits_have_its_ids_and_labels(golden, tokenizer):
    kept = [row for row in rows(golden / "round_ids.jsonl", 120) if not row["reference_cuts"]]
    assert len(kept) == 72
    for row in kept:
        limits = row["max_source_length"], row["max_target_length"]
        found = ROUND.encode_for_training(turns_of(row), tokenizer, *limits)
        assert (found.ids, found.labels) == expected(row)
        assert (found.source_cut, found.target_cut) == (False, False)


def test_rows_beyond_the_tutorials_limits_keep_frame_and_end(golden, tokenizer):
    """Where the tutorial cuts, it loses the cue or the end of the answer; we keep both, within the same limits."""
    cut = [row for row in rows(golden / "round_ids.jsonl", 120) if row["reference_cuts"]]
    assert len(cut) == 48
    for row in cut:
        limits = row["max_source_length"], row["max_target_length"]
        found = ROUND.encode_for_training(turns_of(row), tokenizer, *limits)
        taught = [label for label in found.labels if label != IGNORED]
        prompt = found.ids[: -len(taught)]
        assert found.source_cut or found.target_cut
        assert len(prompt) <= row["max_source_length"]
        assert len(taught) <= row["max_target_length"] + 1
        assert prompt[:2] == [64790, 64792]
        assert decode(prompt, tokenizer).endswith("\n\n答：")
        assert taught[-1] == 2
