"""Ratings and corrections as rows, read by the data formats of the product."""

import json
from pathlib import Path

import pytest

from entrypoints.chat_format.prompt import Message
from entrypoints.dataset.columns import Columns
from entrypoints.dataset.reader import examples, read_rows
from entrypoints.errors import UserError
from entrypoints.web.conversation import Conversation
from entrypoints.web.feedback import ANSWERS, LOG, PREFERENCES, FeedbackFile


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def rated(tmp_path):
    """A conversation with two versions of its second answer."""
    conversation = Conversation()
    for role, text in (("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "坏")):
        conversation.add({"role": role, "content": text}, conversation.leaves[0])
    bad = conversation.path()[-1]
    conversation.leaves = [bad.parent]
    good = conversation.add({"role": "assistant", "content": "好"}, bad.parent)
    bad.system = good.system = "s"
    return FeedbackFile(tmp_path / "new" / "folder"), conversation, good, bad


def test_a_good_answer_is_a_row_for_fine_tuning_and_earlier_answers_are_only_read(rated):
    feedback, conversation, good, _ = rated
    good.rating = 1
    feedback.add(conversation, good)
    assert lines(feedback.folder / ANSWERS) == [
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q1"},
                {"role": "assistant", "content": "a1", "weight": 0},
                {"role": "user", "content": "q2"},
                {"role": "assistant", "content": "好"},
            ]
        }
    ]
    assert lines(feedback.folder / PREFERENCES) == []
    (row,), skipped = examples(read_rows(feedback.folder / ANSWERS), Columns())
    assert skipped == []
    assert [turn.learn for turn in row.turns if turn.role == "assistant"] == [False, True]


def test_a_good_and_a_bad_version_are_a_row_for_preference_tuning(rated):
    feedback, conversation, good, bad = rated
    good.rating, bad.rating = 1, -1
    feedback.add(conversation, good)
    feedback.add(conversation, bad)
    (row,), skipped = examples(read_rows(feedback.folder / PREFERENCES), Columns(rejected="rejected"))
    assert skipped == []
    assert (row.turns[-1], row.rejected) == (Message("assistant", "好"), [Message("assistant", "坏")])


def test_a_correction_is_preferred_to_its_answer_and_a_withdrawn_rating_removes_its_rows(rated):
    feedback, conversation, _good, bad = rated
    bad.correction = "更好"
    feedback.add(conversation, bad)
    assert [row["messages"][-1]["content"] for row in lines(feedback.folder / ANSWERS)] == ["更好"]
    (row,) = lines(feedback.folder / PREFERENCES)
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("更好", "坏")
    bad.correction = None
    feedback.add(conversation, bad)
    assert lines(feedback.folder / ANSWERS) == lines(feedback.folder / PREFERENCES) == []
    assert len(lines(feedback.folder / LOG)) == 2


def test_a_damaged_line_of_the_log_is_ignored(rated):
    feedback, conversation, good, _ = rated
    (feedback.folder / LOG).write_text('{"id": \n[]\n{}\n')
    good.rating = 1
    feedback.add(conversation, good)
    assert len(lines(feedback.folder / ANSWERS)) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--feedback-dir"):
        FeedbackFile(tmp_path / "file")
