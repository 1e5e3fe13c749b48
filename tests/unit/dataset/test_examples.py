"""Usable examples, skipped rows and their reasons, from the rows of a file."""

import json

import pytest

from entrypoints.dataset.columns import Columns
from entrypoints.dataset.reader import Example, SkippedRow, examples, read_rows
from entrypoints.errors import UserError

TWO = [{"content": "类型#裤", "summary": "好"}, {"content": "类型#裙", "summary": "美\n丽"}]


def rows_of(tmp_path, *fields, name="train.json"):
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(row) for row in fields), encoding="utf-8")
    return read_rows(path)


def test_a_missing_column_is_rejected_with_the_existing_columns(tmp_path):
    with pytest.raises(UserError) as caught:
        examples(rows_of(tmp_path, *TWO), Columns(response="response"))
    assert caught.value.problem == "no column 'response' in train.json; columns: content, summary"
    assert caught.value.remedy == "select an existing column with --response-column"


def test_all_missing_columns_are_reported_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        examples(rows_of(tmp_path, *TWO), Columns("prompt", "response", "history"))
    assert caught.value.problem == (
        "no column 'prompt' and no column 'response' and no column 'history' in train.json; columns: content, summary"
    )
    assert all(flag in caught.value.remedy for flag in ("--prompt-column", "--response-column", "--history-column"))


def test_unusable_rows_are_skipped_with_a_reason_and_the_others_keep_their_index(tmp_path):
    """The original script drops such rows silently; predictions then no longer line up with the file."""
    rows = rows_of(
        tmp_path,
        {"content": "a", "summary": ""},
        {"content": None, "summary": "b"},
        {"content": "c", "summary": "d"},
        {"content": 1, "summary": 2},
    )
    used, skipped = examples(rows, Columns())
    path = tmp_path / "train.json"
    assert used == [Example(path, 3, 2, "c", "d", [])]
    reasons = [(1, "empty response"), (2, "null prompt"), (4, "column 'content' is a number, not a string")]
    assert skipped == [SkippedRow(path, line, reason) for line, reason in reasons]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"summary": "b"}, "no column 'content'"),
        ({"content": "a"}, "no column 'summary'"),
        ({"content": "", "summary": "b"}, "empty prompt"),
        ({"content": " \n\u3000", "summary": "b"}, "empty prompt"),
        ({"content": "a", "summary": None}, "null response"),
        ({"content": "a", "summary": ["b"]}, "column 'summary' is an array, not a string"),
        ({"content": "a", "summary": {"text": "b"}}, "column 'summary' is an object, not a string"),
        ({"content": True, "summary": "b"}, "column 'content' is a boolean, not a string"),
        ({"content": "a\ud83d", "summary": "b"}, "prompt contains half a character (a lone surrogate)"),
    ],
)
def test_every_unusable_row_has_its_reason(fields, reason, tmp_path):
    used, skipped = examples(rows_of(tmp_path, {"content": "x", "summary": "y"}, fields), Columns())
    assert [example.index for example in used] == [0]
    assert [(row.line, row.reason) for row in skipped] == [(2, reason)]


@pytest.mark.parametrize(
    ("history", "reason"),
    [
        ("q", "column 'history' is a string, not a list of messages"),
        (0, "column 'history' is a number, not a list of messages"),
        (False, "column 'history' is a boolean, not a list of messages"),
        ({"q": "a"}, "column 'history' is an object, not a list of messages"),
        (["q"], "column 'history' does not end with an answer"),
        ([["q"]], "column 'history': turn 0 is an array without role and content"),
        ([["q", None]], "column 'history': turn 0 is an array without role and content"),
        ([["q", "a", "b"]], "column 'history': turn 0 is an array without role and content"),
        ([["q", "a"], 5], "column 'history': turn 1 is a number without role and content"),
        ([{"question": "q"}], "column 'history': turn 0 is an object without role and content"),
        ([{"question": "q", "answer": 5}], "turn 1 has content that is not a string"),
    ],
)
def test_a_history_in_none_of_its_forms_skips_the_row(history, reason, tmp_path):
    good = {"content": "x", "summary": "y", "history": []}
    _, skipped = examples(rows_of(tmp_path, good, {**good, "history": history}), Columns(history="history"))
    assert [(row.line, row.reason) for row in skipped] == [(2, reason)]


@pytest.mark.parametrize(
    "history",
    [
        [["q", "r"], ["s", "t"]],
        ["q", "r", "s", "t"],
        [{"question": "q", "answer": "r"}, {"human": "s", "assistant": "t"}],
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}, ["s", "t"]],
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}, {"query": "s", "response": "t"}],
        '[["q", "r"], ["s", "t"]]',
    ],
)
def test_a_history_is_pairs_objects_messages_or_a_flat_list(history, tmp_path):
    used, skipped = examples(rows_of(tmp_path, {"content": "a", "summary": "b", "history": history}), Columns())
    assert skipped == []
    assert [turn.content for turn in used[0].messages()] == ["q", "r", "s", "t", "a", "b"]
    assert [turn.role for turn in used[0].messages()] == ["user", "assistant"] * 3


def test_a_lone_surrogate_in_the_history_skips_the_row(tmp_path):
    good = {"content": "x", "summary": "y", "history": []}
    _, skipped = examples(rows_of(tmp_path, good, {**good, "history": [["\ude00", ""]]}), Columns(history="history"))
    assert [row.reason for row in skipped] == ["history contains half a character (a lone surrogate)"]


def test_an_emoji_written_as_two_escapes_is_one_character(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(r'{"content": "\ud83d\ude00", "summary": "b"}', encoding="utf-8")
    assert examples(read_rows(path), Columns())[0][0].prompt == "😀"


def test_history_is_pairs_and_an_empty_null_or_missing_history_is_none(tmp_path):
    rows = rows_of(
        tmp_path,
        {"content": "a", "summary": "b", "history": [["q", "r"], ["s", ""]]},
        {"content": "a", "summary": "b", "history": []},
        {"content": "a", "summary": "b", "history": None},
        {"content": "a", "summary": "b"},
    )
    used, skipped = examples(rows, Columns(history="history"))
    assert [example.history for example in used] == [[("q", "r"), ("s", "")], [], [], []]
    assert skipped == []


def test_a_history_column_that_is_not_selected_is_named_as_unused(tmp_path, caplog):
    used, _ = examples(rows_of(tmp_path, {"content": "a", "summary": "b", "history": 7}), Columns(prompt="content"))
    assert used[0].history == []
    assert f"{tmp_path / 'train.json'}: not used: history in 1 rows" in caplog.text


def test_a_file_without_a_usable_row_is_rejected_with_the_counts(tmp_path):
    rows = rows_of(
        tmp_path, {"content": "a", "summary": ""}, {"content": "b", "summary": ""}, {"content": None, "summary": "c"}
    )
    with pytest.raises(
        UserError, match=r"no usable row in train.json: 2 empty response, 1 null prompt \(first in line 1\)"
    ):
        examples(rows, Columns())


def test_more_skipped_rows_than_allowed_are_rejected_with_the_place_of_the_first_one(tmp_path):
    rows = rows_of(tmp_path, *TWO, {"content": "b", "summary": {"text": "c"}}, {"content": "", "summary": "d"})
    with pytest.raises(UserError) as caught:
        examples(rows, Columns(), max_skipped=1)
    assert caught.value.problem == (
        f"{tmp_path / 'train.json'}:3: column 'summary' is an object, not a string; 2 rows cannot be used"
        " (1 column 'summary' is an object, not a string, 1 empty prompt)"
    )
    assert caught.value.remedy == "fix them, or allow them with --max-skipped 2"
    assert len(examples(rows, Columns(), max_skipped=2)[0]) == 2


def test_the_index_counts_the_rows_of_all_parts(tmp_path):
    """Predictions are sorted by it."""
    used, _ = examples(rows_of(tmp_path, *TWO, name="a.json") + rows_of(tmp_path, *TWO, name="b.json"), Columns())
    assert " ".join(f"{example.file.name}:{example.index}" for example in used) == "a.json:0 a.json:1 b.json:2 b.json:3"


def test_an_empty_list_of_rows_is_rejected():
    with pytest.raises(UserError, match="there are no rows"):
        examples([], Columns())


CALL = {"function": {"name": "f", "arguments": "{}"}}
QUESTION = {"role": "user", "content": "u"}


@pytest.mark.parametrize(
    ("more", "answer", "reason"),
    [
        ({"tools": "[f]"}, {"content": "a"}, "column 'tools' is a string, not a list of tools"),
        ({"tools": {"name": "f"}}, {"content": "a"}, "column 'tools' is an object, not a list of tools"),
        ({"tools": [{"function": {}}]}, {"content": "a"}, "tools.0 has no name"),
        (
            {"tools": [{"name": "\ud83d"}]},
            {"content": "a"},
            "the conversation contains half a character (a lone surrogate)",
        ),
        ({}, {"content": None, "tool_calls": [{}]}, "messages.1.tool_calls.0 is not a function call"),
    ],
)
def test_a_conversation_with_malformed_tools_is_skipped_with_its_reason(more, answer, reason, tmp_path):
    """As the API rejects such a request."""
    good = {"talk": [QUESTION, {"role": "assistant", "content": "a"}], "tools": None}
    bad = {"talk": [QUESTION, {"role": "assistant", **answer}], **more}
    used, skipped = examples(rows_of(tmp_path, good, bad), Columns(conversations="talk"))
    assert (len(used), [row.reason for row in skipped]) == (1, [reason])
