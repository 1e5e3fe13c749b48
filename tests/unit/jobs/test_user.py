"""glm user: users of the pages, with passwords and API keys."""

import io
import os
import pty
import subprocess
import sys

import pytest

from entrypoints.api.auth import KeyRing
from entrypoints.web.conversation_database import ConversationDatabase
from entrypoints.web.users import read_users, verify_password


@pytest.fixture
def enter(glm, monkeypatch):
    """Run `glm user` with a password on the standard input."""

    def run(*words, password="geheimnis", code=0):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{password}\n"))
        outcome = glm("user", *words)
        assert outcome.code == code, outcome
        return outcome

    return run


def test_a_user_is_added_with_a_hash_and_replaced_with_a_new_password(enter, tmp_path):
    file = tmp_path / "users.txt"
    assert enter(file, "anna").err.endswith(f"user anna added in {file}\n")
    assert "geheimnis" not in file.read_text()
    assert verify_password("geheimnis", read_users(file)[0].password_hash)
    assert "already has a user anna; choose another name, or add --replace" in enter(file, "anna", code=1).err
    enter(file, "anna", "--replace", password="new password")
    assert verify_password("new password", read_users(file)[0].password_hash)
    assert "has no user ben; omit --replace to add the user" in enter(file, "ben", "--replace", code=1).err


def test_a_user_can_have_an_api_key_of_the_same_name(enter, tmp_path):
    users, keys = tmp_path / "users.txt", tmp_path / "keys.txt"
    enter(users, "anna", "--api-keys-file", keys)
    key = read_users(users)[0].api_key
    assert KeyRing(keys).find(f"Bearer {key}").name == "anna"
    enter(users, "anna", "--replace")
    assert read_users(users)[0].api_key == key


@pytest.mark.parametrize("folder", ["", "state"], ids=["beside-the-users-file", "in-the-state-dir"])
def test_a_deleted_user_and_the_conversations_of_the_user_are_gone(folder, enter, tmp_path):
    users, flags = tmp_path / "users.txt", ["--state-dir", tmp_path / folder] if folder else []
    for name in ("anna", "ben"):
        enter(users, name)
    database = ConversationDatabase(tmp_path / folder)
    for name, id_ in (("anna", "1"), ("anna", "2"), ("ben", "1")):
        database.write(name, id_, "{}", None)
    deleted = enter(users, "anna", "--delete", *flags)
    assert deleted.err.endswith("user anna deleted, with 2 stored conversations\n")
    assert [user.name for user in read_users(users)] == ["ben"]
    assert [len(database.versions(name)) for name in ("anna", "ben")] == [0, 1]
    assert f"{users} has no user anna" in enter(users, "anna", "--delete", *flags, code=1).err


def test_conversations_of_a_user_whose_line_was_removed_by_hand_are_deleted_too(enter, tmp_path):
    enter(tmp_path / "users.txt", "ben")
    ConversationDatabase(tmp_path).write("anna", "1", "{}", None)
    assert "with 1 stored conversations" in enter(tmp_path / "users.txt", "anna", "--delete").err


@pytest.mark.parametrize(
    ("name", "password", "problem"),
    [
        ("a b", "geheimnis", "'a b' is not a valid user name; use at most 64 printable characters"),
        ("anna", "short", "the password has 5 characters; choose one of 8 to 1024 characters"),
    ],
)
def test_a_bad_name_or_password_is_reported_and_nothing_is_written(name, password, problem, enter, tmp_path):
    assert problem in enter(tmp_path / "users.txt", name, password=password, code=1).err
    assert not (tmp_path / "users.txt").exists()


def test_in_a_terminal_the_password_is_asked_for_twice_without_showing_it(tmp_path):
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "entrypoints", "user", tmp_path / "users.txt", "anna"]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    shown = b""
    for prompt, answer in ((b"password: ", b"geheimnis\n"), (b"password again: ", b"geheimnis\n"), (b"added", b"")):
        while prompt not in shown:
            shown += os.read(main, 1000)
        os.write(main, answer)
    assert process.wait(60) == 0
    os.close(main)
    assert b"geheimnis" not in shown
    assert verify_password("geheimnis", read_users(tmp_path / "users.txt")[0].password_hash)
