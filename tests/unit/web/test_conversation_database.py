"""Conversations of signed-in users on the server."""

import json
import sqlite3
import stat

import pytest

from entrypoints.errors import UserError
from entrypoints.web import conversation_database
from entrypoints.web.conversation import Conversation
from entrypoints.web.conversation_database import ConversationDatabase, UserConversations
from entrypoints.web.conversation_list import ConversationList
from entrypoints.web.session import ChatSession
from entrypoints.web.user_sign_in import PROOF, USER_HEADER, user_name
from entrypoints.web.users import PageUser, hash_password, put_user, remove_user
from entrypoints.web.visitors import Visitors, is_of_another_user


@pytest.fixture
def database(tmp_path):
    return ConversationDatabase(tmp_path / "state")


def tab(database: ConversationDatabase, user: str = "anna") -> ConversationList:
    """The list of a browser tab, as the page shows it after loading."""
    found = ConversationList(place="server", stored=UserConversations(database, user, lambda: True))
    found.restore("[]")
    return found


def talk(title: str, *texts: str) -> Conversation:
    conversation = Conversation(title=title)
    for number, text in enumerate(texts):
        conversation.add({"role": ("user", "assistant")[number % 2], "content": text}, conversation.leaves[0])
    return conversation


def stored_texts(database: ConversationDatabase) -> list[tuple[str, str]]:
    """(user, title) of all rows, read without the code under test."""
    with sqlite3.connect(database.file) as connection:
        rows = connection.execute("SELECT user, text FROM conversations ORDER BY user, text").fetchall()
    connection.close()
    return [(user, json.loads(text)["title"]) for user, text in rows]


def test_a_conversation_is_there_in_another_browser_of_the_user_and_in_none_of_another_user(database):
    conversation = talk("<b>苹果</b>", "问", "答")
    assert tab(database).save(conversation)
    assert [title for title, _ in tab(database).entries("问")] == ["<b>苹果</b>"]
    assert tab(database).get(conversation.id) == conversation
    other = tab(database, "ben")
    assert other.entries() == []
    assert other.get(conversation.id) is None
    assert other.remove(conversation.id)
    assert stored_texts(database) == [("anna", "<b>苹果</b>")]


def test_an_open_tab_sees_what_another_one_changed_and_deleted(database):
    one, two = tab(database), tab(database)
    conversation = talk("一", "问", "答")
    one.save(conversation)
    two.synchronize()
    assert [title for title, _ in two.entries()] == ["一"]
    conversation.title = "二"
    one.save(conversation)
    assert two.get(conversation.id).title == "二"
    one.remove(conversation.id)
    assert two.get(conversation.id) is None
    assert two.entries() == []


def test_a_conversation_that_two_tabs_continue_becomes_two(database):
    one = tab(database)
    first = talk("一", "问", "答")
    one.save(first)
    two = tab(database)
    second = two.get(first.id)
    for owner, conversation, text in ((one, first, "甲"), (two, second, "乙")):
        conversation.title = text
        assert owner.save(conversation)
    assert first.id != second.id
    assert sorted(title for _, title in stored_texts(database)) == ["乙", "甲"]
    two.synchronize()
    assert sorted(title for title, _ in two.entries()) == ["乙", "甲"]


def test_a_conversation_that_was_deleted_elsewhere_returns_only_when_it_is_continued(database):
    one, two = tab(database), tab(database)
    conversation = talk("一", "问", "答")
    one.save(conversation)
    shown = two.get(conversation.id)
    one.remove(conversation.id)
    two.synchronize()
    two.put(shown)
    two.changes(shown)
    assert stored_texts(database) == []
    assert two.entries() == []
    shown.add({"role": "user", "content": "还有"}, shown.leaves[0])
    two.changes(shown)
    assert stored_texts(database) == [("anna", "一")]
    assert [title for title, _ in two.entries()] == ["一"]


def test_nothing_is_stored_for_a_user_whom_the_operator_has_deleted(database, tmp_path):
    users = tmp_path / "users.txt"
    put_user(users, PageUser("anna", hash_password("correct horse")))
    session = ChatSession()
    visitors = Visitors(str(users), "server", database)
    visitors.welcome(session, {USER_HEADER: f"{PROOF}:anna"})
    assert session.kept.save(talk("一", "问"))
    assert remove_user(users, "anna")
    assert database.remove_user("anna") == 1
    assert session.kept.save(talk("二", "问"))
    assert stored_texts(database) == []


def test_the_browser_stores_nothing_if_conversations_are_on_the_server_or_off(database):
    for kept in (tab(database), ConversationList(place="off")):
        kept.restore(json.dumps([json.dumps(talk("浏览器中的", "问").to_json())]))
        assert kept.entries() == []
        conversation = talk("一", "问", "答")
        kept.put(conversation)
        changes = kept.changes(conversation)
        assert (changes["put"], changes["remove"]) == ({}, [])
        assert [title for title, _ in kept.entries()] == ["一"]


def test_without_a_sign_in_the_server_stores_nothing(database):
    """`streamlit run` serves the page without a sign-in, whatever the settings say."""
    session = ChatSession()
    Visitors("", "server", database).welcome(session, {USER_HEADER: "anna"})
    session.kept.save(talk("一", "问"))
    assert (session.kept.place, stored_texts(database)) == ("off", [])


def test_a_name_that_a_client_sends_itself_is_ignored():
    assert user_name({USER_HEADER: f"{PROOF}:%E7%8E%8B"}) == "王"
    assert [user_name({USER_HEADER: text}) for text in ("anna", ":anna", "x:anna", "密:anna")] == [""] * 4


def test_a_tab_is_refused_when_another_user_has_signed_in():
    session = ChatSession()
    assert not is_of_another_user(session, {USER_HEADER: f"{PROOF}:anna"})  # before the page is loaded
    session.user = "anna"
    assert not is_of_another_user(session, {USER_HEADER: f"{PROOF}:anna"})
    assert is_of_another_user(session, {USER_HEADER: f"{PROOF}:ben"})
    assert is_of_another_user(session, {})


def test_the_oldest_conversations_of_a_user_make_room(database, monkeypatch):
    size = len(json.dumps(talk("一", "x" * 1000).to_json(), ensure_ascii=False).encode())
    monkeypatch.setattr(conversation_database, "MAX_USER_BYTES", size * 5 // 2)
    tab(database, "ben").save(talk("Ben", "x" * 1000))
    kept = tab(database)
    for title in "一二三":
        kept.save(talk(title, "x" * 1000))
    assert sorted(title for _, title in stored_texts(database)) == ["Ben", "三", "二"]


def test_only_the_owner_may_read_the_file_and_deleted_texts_are_overwritten(database):
    assert stat.S_IMODE(database.file.stat().st_mode) == 0o600
    kept, conversation = tab(database), talk("一", "a secret text " * 10)
    kept.save(conversation)
    assert b"a secret text" in database.file.read_bytes()
    kept.remove(conversation.id)
    assert b"a secret text" not in database.file.read_bytes()


def test_a_failure_to_store_is_reported_and_the_conversation_stays(database):
    session = ChatSession(kept=tab(database), conversation=talk("一", "问"))
    database.file.unlink()
    database.file.mkdir()
    assert not session.kept.save(session.conversation)
    session.delete()
    assert session.error.key == "not_stored"
    assert [title for title, _ in session.kept.entries()] == ["一"]


def test_a_file_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "conversations.sqlite3").write_text("no database")
    with pytest.raises(UserError, match=r"conversations\.sqlite3.*--state-dir"):
        ConversationDatabase(tmp_path)


def test_a_file_of_a_later_version_is_left_alone(database):
    with sqlite3.connect(database.file) as connection:
        connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(UserError, match="format 9"):
        ConversationDatabase(database.file.parent)
