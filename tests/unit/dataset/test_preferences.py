"""Preference rows: each public shape gives the same turns, and a row that cannot be used is skipped with its reason."""

import itertools
import json
from pathlib import Path

import pytest

from entrypoints.chat_format.prompt import Message
from entrypoints.dataset.columns import Columns
from entrypoints.dataset.json_stream import Row
from entrypoints.dataset.reader import Example, SkippedRow, check_rows, stream_examples
from entrypoints.errors import UserError

QUESTION = {"role": "user", "content": "你好"}
PREFERENCES = Columns(rejected="rejected")
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("你好呀", "走开"))
ABSENT = "(absent)"  # a row without this field
SHAPES = {
    "Alpaca": {"instruction": "你好", "input": "", "chosen": "你好呀", "rejected": "走开"},
    "texts": {"prompt": "你好", "chosen": "你好呀", "rejected": "走开"},
    "own column": {"content": "你好", "chosen": "你好呀", "rejected": "走开"},
    "query": {"query": "你好", "chosen": "你好呀", "rejected": "走开"},
    "question": {"question": "你好", "chosen": "你好呀", "rejected": "走开"},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "你好"}],
        "chosen": {"from": "gpt", "value": "你好呀"},
        "rejected": {"from": "gpt", "value": "走开"},
    },
    "TRL": {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]},
    "messages": {"messages": [QUESTION], "chosen": GOOD, "rejected": BAD},
    "cells of a table": {
        "messages": json.dumps([QUESTION]),
        "chosen": json.dumps(GOOD),
        "rejected": json.dumps([BAD]),
        "tools": "",
    },
    "TRL, implicit prompt": {"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
    "TRL, repeated prompt": {"prompt": "你好", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
}


def read(fields, columns=PREFERENCES):
    reader = stream_examples([Row(Path("rows.jsonl"), 3, fields)], columns)
    return next(iter(reader)), reader.unused


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_every_shape_gives_the_same_turns(fields):
    found, unused = read(fields)
    assert isinstance(found, Example), found
    assert found.turns == [Message("user", "你好"), Message("assistant", "你好呀")]
    assert found.rejected == [Message("assistant", "走开")]
    assert not unused


def test_earlier_answers_are_read_and_not_learned():
    fields = {"instruction": "再短些", "input": "十个字", "history": [["写广告", "红裙很美"]], "system": "助手"}
    found, unused = read(fields | {"chosen": "美", "rejected": "丑"})
    assert found.turns == [
        Message("system", "助手"),
        Message("user", "写广告"),
        Message("assistant", "红裙很美", learn=False),
        Message("user", "再短些\n十个字"),
        Message("assistant", "美"),
    ]
    assert not unused


def test_tools_and_calls_of_sharegpt_are_those_of_the_api():
    tools = [{"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}]
    fields = {"conversations": [{"from": "human", "value": "下雨吗"}], "tools": json.dumps(tools)}
    call = {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"city": "北京"}})}
    found, unused = read(fields | {"chosen": call, "rejected": {"from": "gpt", "value": "不知道"}})
    assert found.turns[0].tools[0]["name"] == "weather"
    assert (found.turns[-1].metadata, "北京" in found.turns[-1].content) == ("weather", True)
    assert found.rejected == [Message("assistant", "不知道")]
    assert not unused


def test_fields_with_a_value_that_nothing_reads_are_counted():
    _, unused = read(SHAPES["texts"] | {"score_chosen": 5, "source": "x", "empty": "", "input": "text"})
    assert unused == {"score_chosen": 1, "source": 1, "input": 1}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"chosen": ""}, "empty chosen"),
        ({"chosen": None}, "null chosen"),
        ({"chosen": ABSENT}, "no column 'chosen'"),
        ({"rejected": ABSENT}, "no column 'rejected'"),
        ({"rejected": "你好呀"}, "chosen and rejected are equal"),
        ({"prompt": None}, "null prompt"),
        ({"prompt": ABSENT}, "no column 'prompt'"),
        ({"chosen": 5}, "column 'chosen' is a number, not a string"),
        ({"chosen": [QUESTION]}, "chosen: the conversation does not end with an answer"),
        ({"chosen": [{"role": "assistant", "content": ""}]}, "chosen: empty response"),
        ({"chosen": [GOOD, QUESTION, GOOD]}, "chosen and rejected do not follow the same turns"),
        ({"chosen": "\ud83d"}, "chosen: the conversation contains half a character (a lone surrogate)"),
        ({"prompt": [QUESTION, GOOD]}, "chosen: the last answer does not follow a question"),
        (
            {"prompt": "另一个", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
            "column 'prompt' is not part of the conversation in chosen",
        ),
        ({"tools": "{"}, "column 'tools' is a string, not a list of tools"),
        ({"history": 5}, "column 'history' is a number"),
        ({"history": ["a"]}, "column 'history' does not end with an answer"),
        ({"prompt": [{"role": "nobody", "content": "x"}]}, "nobody"),
    ],
    ids=str,
)
def test_a_row_that_cannot_be_used_is_skipped_with_its_line_and_reason(changed, reason):
    """Read among good rows, which decide the shape."""
    fields = {name: value for name, value in (SHAPES["texts"] | changed).items() if value != ABSENT}
    good = [Row(Path("rows.jsonl"), line, SHAPES["texts"]) for line in (1, 2)]
    found = list(stream_examples([*good, Row(Path("rows.jsonl"), 3, fields)], PREFERENCES))
    assert isinstance(found[2], SkippedRow)
    assert found[2].line == 3
    assert reason in found[2].reason


def test_an_answer_that_is_json_is_a_text():
    answers = {"chosen": '{"a": 1}', "rejected": '[{"b": 2}]'}
    found, _ = read(SHAPES["texts"] | answers)
    assert [found.turns[-1].content, found.rejected[0].content] == list(answers.values())


def test_all_flags_of_columns_have_their_effect():
    fields = {
        "q": "问",
        "more": "据此",
        "past": [["x", "y"]],
        "role": "系统",
        "good": "好",
        "bad": "差",
        "prompt": "不",
    }
    columns = Columns("q", "good", "past", input="more", system="role", rejected="bad")
    found, unused = read(fields, columns)
    assert [turn.content for turn in found.turns] == ["系统", "x", "y", "问\n据此", "好"]
    assert ([turn.content for turn in found.rejected], unused) == (["差"], {"prompt": 1})
    fields = {"talk": [QUESTION], "chosen": GOOD, "rejected": BAD, "prompt": "x", "query": "y"}
    found, unused = read(fields, Columns(conversations="talk", rejected="rejected"))
    assert (found.turns[0].content, unused) == ("你好", {"prompt": 1, "query": 1})
    with pytest.raises(UserError, match=r"--input-column has no effect on rows in the shape preferences \(talk"):
        read(fields, Columns(conversations="talk", input="prompt", rejected="rejected"))


@pytest.mark.parametrize(
    ("format", "question"),
    [
        ("auto", "messages"), ("messages", "messages"), ("alpaca", "instruction"), ("firefly", "input"),
        ("prompt-response", "prompt"), ("columns", "content"),
    ],
)  # fmt: skip
def test_a_format_selects_the_column_of_the_question(format, question):
    names = ("instruction", "prompt", "content", "input")
    fields = {name: name for name in names} | {"messages": [{"role": "user", "content": "messages"}]}
    found, _ = read(fields | {"chosen": "a", "rejected": "b"}, Columns(format=format, rejected="rejected"))
    assert found.turns[0].content.startswith(question)


def test_columns_beside_whole_conversations_are_named_as_unused():
    fields = SHAPES["TRL, repeated prompt"] | {"history": [["a", "b"]], "score": 1}
    assert read(fields)[1] == {"history": 1, "score": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"content": "a", "summary": "b"},
            "no column 'chosen' and no column 'rejected' in train.jsonl; columns: content, summary",
        ),
        ({"a": "b", "chosen": "c", "rejected": "d"}, "no usable row in train.jsonl: 1 chosen: the last answer does"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "1 chosen and rejected are equal (first in line 2)"),
    ],
    ids=str,
)
def test_a_file_without_preferences_is_rejected_with_its_columns(row, message, tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text("\n" + json.dumps(row))
    with pytest.raises(UserError) as caught:
        check_rows(file, "utf-8", PREFERENCES, 0)
    assert message in str(caught.value)


def test_rows_are_read_one_by_one_and_the_shape_is_named():
    rows = (Row(Path("rows.jsonl"), line, SHAPES["Alpaca"]) for line in itertools.count(1))
    reader = stream_examples(rows, PREFERENCES)
    assert all(isinstance(row, Example) for row in itertools.islice(reader, 1000))
    assert (reader.shape.name, reader.rows) == ("preferences (instruction, chosen, rejected)", 1000)
