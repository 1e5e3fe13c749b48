"""Conversations as trees of messages: versions, branches, deletion, storage and export."""

import json
from pathlib import Path

import pytest

from entrypoints.dataset.columns import Columns
from entrypoints.dataset.reader import examples, parse_rows
from entrypoints.web.browser_storage import KEPT_SETTINGS, restored_settings
from entrypoints.web.conversation import Attachment, Conversation, parse_conversations
from entrypoints.web.conversation_list import ConversationList
from entrypoints.web.request_errors import ErrorMessage

ROLES = {"user": "U", "assistant": "A", "tool": "T"}


def talk(*texts: str) -> Conversation:
    """A conversation of questions and answers in turn."""
    conversation = Conversation(title="题")
    for number, text in enumerate(texts):
        role = ("user", "assistant")[number % 2]
        conversation.add({"role": role, "content": text}, conversation.leaves[0])
    return conversation


def texts(conversation: Conversation, side: int = 0) -> list[str]:
    return [node.message["content"] for node in conversation.path(side)]


def call(id_: str) -> dict:
    return {"id": id_, "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_a_new_version_replaces_nothing():
    conversation = talk("q1", "a1", "q2", "a2")
    first, answer = conversation.path()[0], conversation.path()[1]
    conversation.leaves = [first.id]
    newer = conversation.add({"role": "assistant", "content": "a1*"}, first.id)
    assert texts(conversation) == ["q1", "a1*"]
    assert [node.message["content"] for node in conversation.versions(newer)] == ["a1", "a1*"]
    conversation.show(answer)
    assert texts(conversation) == ["q1", "a1", "q2", "a2"]


def test_a_removed_message_takes_those_below_it_and_gives_way_to_another_version():
    conversation = talk("q1", "a1", "q2", "a2")
    question = conversation.path()[2]
    conversation.leaves = [question.parent]
    conversation.add({"role": "user", "content": "q2*"}, question.parent)
    conversation.remove(conversation.path()[-1])
    assert texts(conversation) == ["q1", "a1", "q2", "a2"]
    conversation.remove(question)
    assert texts(conversation) == ["q1", "a1"]
    conversation.remove(conversation.path()[0])
    assert texts(conversation) == []
    assert conversation.nodes == {}


def test_a_branch_is_a_conversation_of_its_own():
    conversation = talk("q1", "a1", "q2", "a2")
    branch = conversation.branch(conversation.path()[1])
    branch.add({"role": "user", "content": "q3"}, branch.leaves[0])
    assert (texts(branch), texts(conversation)) == (["q1", "a1", "q3"], ["q1", "a1", "q2", "a2"])
    assert branch.id != conversation.id


def test_a_stored_conversation_is_read_back_equal():
    conversation = talk("q <b>", "a")
    question, answer = conversation.path()
    question.error = ErrorMessage("busy", {"seconds": "5"})
    question.attachment = Attachment("x.txt", "text")
    answer.rating, answer.correction = 1, "c"
    answer.message["tool_calls"] = [call("1")]
    text = json.dumps(conversation.to_json())
    assert parse_conversations(text) == [conversation]
    assert parse_conversations(json.dumps([conversation.to_json()] * 2)) == [conversation] * 2


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda stored: stored.update(nodes=1), "0.nodes"),
        (lambda stored: stored.update(leaves=[7]), "nodes"),
        (lambda stored: stored.update(leaves=[]), "nodes"),
        (lambda stored: stored["nodes"]["2"].update(parent=2), "nodes"),
        (lambda stored: stored["nodes"]["1"].update(parent=2), "nodes"),
        (lambda stored: stored["nodes"]["1"].update(parent=9), "nodes"),
        (lambda stored: stored["nodes"]["1"]["message"].update(role="root"), "0.nodes.1.message.role"),
        (lambda stored: stored["nodes"]["1"]["message"].update(content=None), "0.nodes.1.message.content"),
    ],
)
def test_a_file_with_a_wrong_field_is_refused_by_its_name(change, field):
    stored = json.loads(json.dumps(talk("q", "a").to_json()))
    change(stored)
    assert parse_conversations(json.dumps(stored)) == ErrorMessage("bad_import", {"field": field})


@pytest.mark.parametrize("text", ["", "{", "1", "null", "[" * 100000, "[1]"])
def test_a_file_that_is_no_conversation_is_refused(text):
    assert parse_conversations(text).key == "bad_import"


def test_a_file_that_is_too_large_is_refused():
    assert parse_conversations("x" * 2_000_001).key == "import_too_large"


def test_a_conversation_without_an_answer_exports_no_row():
    assert Conversation().training_row() is None
    assert talk("q").training_row() is None
    assert talk("q", " ").training_row() is None


def test_rounds_with_tool_calls_and_failed_questions_are_not_exported():
    conversation = talk("q1", "a1", "failed")
    conversation.path()[-1].error = ErrorMessage("stopped_early")
    for message in (
        {"role": "user", "content": "t"},
        {"role": "assistant", "content": "", "tool_calls": [call("1")]},
        {"role": "tool", "tool_call_id": "1", "content": "r"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "q2\n"},
        {"role": "assistant", "content": "wrong"},
    ):
        conversation.add(message, conversation.leaves[0])
    conversation.path()[-1].correction = 'a"2'
    line = json.dumps(conversation.training_row()).encode()
    (row,), skipped = examples(parse_rows(line, Path("x")), Columns(history="history"))
    assert skipped == []
    assert (row.prompt, row.response, row.history) == ("q2\n", 'a"2', [("q1", "a1")])


def test_the_markdown_export_has_all_shown_messages():
    conversation = talk("q", "**a**")
    conversation.path()[1].message["tool_calls"] = [call("1")]
    assert conversation.to_markdown(ROLES) == "# 题\n\n## U\n\nq\n\n## A\n\n**a**\n\n`f({})`\n"


def test_conversations_are_listed_newest_first_and_found_by_their_text():
    kept = ConversationList()
    for number, text in enumerate(("苹果 Apple", "梨")):
        conversation = talk(text, "答")
        conversation.title, conversation.updated = f"title {number}", float(number)
        kept.put(conversation)
    kept.put(Conversation())  # without messages it is not listed
    assert [title for title, _ in kept.entries()] == ["title 1", "title 0"]
    assert [title for title, _ in kept.entries(" apple ")] == ["title 0"]
    assert [title for title, _ in kept.entries("答")] == ["title 1", "title 0"]


def test_what_the_browser_kept_is_restored_and_damaged_entries_are_ignored():
    kept, conversation = ConversationList(), talk("q", "a")
    changes = kept.changes(conversation)
    again = ConversationList()
    again.restore(json.dumps([changes["put"][conversation.id], "{", None, 3]))
    assert again.conversations == {conversation.id: conversation}
    again.restore("no JSON")
    again.remove(conversation.id)
    assert again.changes(Conversation())["remove"] == [conversation.id]
    assert again.changes(Conversation())["remove"] == []


def test_an_imported_conversation_does_not_replace_one_of_the_same_id():
    kept, conversation = ConversationList(), talk("q", "a")
    kept.put(conversation)
    (imported,) = kept.add_from(json.dumps(conversation.to_json()))
    assert imported.id != conversation.id
    assert len(kept.conversations) == 2


def test_kept_settings_outside_of_their_range_are_left_out():
    values = ["zh", "dark", "m", "s", 0, 9, 0.5, True, "[]", '["p"]']
    settings = restored_settings(json.dumps(values))
    assert settings == {
        "language": "zh", "theme": "dark", "model": "m", "system": "s", "top_p": 0.5, "tool_mode": True,
        "tools": "[]", "prompts": ["p"],
    }  # fmt: skip
    assert len(values) == len(KEPT_SETTINGS)
    assert restored_settings(None) == restored_settings("[1]") == restored_settings("{") == {}
