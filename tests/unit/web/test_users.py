"""The users file of the pages: names, password hashes, API keys."""

import base64
import hashlib
import os
import unicodedata

import pytest

from entrypoints.errors import UserError
from entrypoints.web.users import (
    PageUser,
    UserFile,
    check_name,
    hash_password,
    put_user,
    read_users,
    remove_user,
    verify_password,
)

FAST = "scrypt$1$1$1$" + "$".join(
    base64.b64encode(part).decode()
    for part in (b"salt", hashlib.scrypt(b"geheimnis", salt=b"salt", n=2, r=1, p=1, dklen=32))
)  # computed with the library itself


def test_a_password_is_verified_by_the_parameters_in_its_hash():
    assert verify_password("geheimnis", FAST)
    assert not verify_password("Geheimnis", FAST)


def test_two_hashes_of_a_password_differ_and_contain_neither_it_nor_its_plain_hash():
    first, second = (hash_password("correct horse") for _ in range(2))
    assert first != second
    assert first.startswith("scrypt$15$8$3$")  # OWASP: N = 2^15, r = 8, p = 3
    assert "correct" not in first
    assert all(verify_password("correct horse", one) for one in (first, second))
    assert not verify_password("correct horsf", first)


@pytest.mark.parametrize("password", ["密码密码", "Grüße", "🔑🔑", "a:b c"])
def test_composed_and_decomposed_passwords_are_the_same(password):
    stored = hash_password(unicodedata.normalize("NFD", password))
    assert verify_password(unicodedata.normalize("NFC", password), stored)


@pytest.mark.parametrize("stored", ["", "scrypt", "scrypt$99$99$99$YQ==$YQ==", "scrypt$1$1$1$!$YQ==", "plain"])
def test_what_is_no_hash_accepts_no_password(stored):
    assert not verify_password("geheimnis", stored)


def test_users_are_added_replaced_and_read_again(tmp_path):
    file = tmp_path / "users"
    file.write_text("# people of the team\nanna " + FAST)  # without a line break at the end
    put_user(file, PageUser("ben", FAST, "glm-key"))
    put_user(file, PageUser("anna", FAST, "glm-other"))
    assert read_users(file) == [PageUser("ben", FAST, "glm-key"), PageUser("anna", FAST, "glm-other")]
    assert file.read_text().startswith("# people of the team\n")


def test_a_new_file_is_readable_by_its_owner_only_and_an_old_mode_stays(tmp_path):
    file = tmp_path / "users"
    put_user(file, PageUser("anna", FAST))
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o640)
    put_user(file, PageUser("ben", FAST))
    assert file.stat().st_mode & 0o777 == 0o640


def test_a_comment_with_any_character_stays_one_line(tmp_path):
    file = tmp_path / "users"
    file.write_text(f"# 销售部\u2028from\x0cMay\n\nanna {FAST}", encoding="utf-8")
    put_user(file, PageUser("ben", FAST))
    assert file.read_text(encoding="utf-8") == f"# 销售部\u2028from\x0cMay\n\nanna {FAST}\nben {FAST}\n"
    assert remove_user(file, "anna")
    assert [user.name for user in read_users(file)] == ["ben"]


@pytest.mark.parametrize("line", ["anna", "anna geheimnis", "anna scrypt$1$1", f"a b {FAST}"])
def test_a_malformed_line_is_named(line, tmp_path):
    (tmp_path / "users").write_text(f"\n{line}\n")
    with pytest.raises(UserError, match=r"users:2 is not a user: NAME HASH \[API-KEY\]; add users with glm user"):
        read_users(tmp_path / "users")


def test_a_user_who_is_there_twice_and_an_absent_file_are_errors(tmp_path):
    (tmp_path / "users").write_text(f"anna {FAST}\nanna {FAST}\n")
    with pytest.raises(UserError, match="users:2 has the user anna again; delete one of the lines"):
        read_users(tmp_path / "users")
    with pytest.raises(UserError, match=r"cannot read the users file .*create it with glm user"):
        UserFile(tmp_path / "absent")


@pytest.mark.parametrize("name", ["", "a b", "a#b", "a\u200bb", "a\nb", "x" * 65])
def test_a_name_that_a_line_cannot_hold_is_rejected(name):
    with pytest.raises(UserError, match="is not a valid user name; use at most 64 printable characters"):
        check_name(name)
    assert check_name("王小明") == "王小明"


def test_a_changed_file_is_read_again_and_a_damaged_one_keeps_the_users(tmp_path):
    file = tmp_path / "users"
    put_user(file, PageUser("anna", FAST))
    users = UserFile(file)
    put_user(file, PageUser("ben", FAST))
    assert users.find("ben") == PageUser("ben", FAST)
    file.write_text("damaged")
    os.utime(file, (1, 1))
    assert users.find("ben") == PageUser("ben", FAST)
    assert users.is_password("ben", "geheimnis")
    assert not users.is_password("nobody", "geheimnis")
