"""The one line of a user error, whatever text a file puts into it."""

import pickle
import unicodedata

import pytest

from entrypoints.errors import UserError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\r\nc", r"a\nb\r\nc"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("\u202etxt.exe", r"\u202etxt.exe"),
        ("\ud800", r"\ud800"),
        ("列 “内容”　（1）C:\\x", "列 “内容”　（1）C:\\x"),
        ("", ""),
    ],
)
def test_a_user_error_is_one_line_without_control_characters(text, shown):
    error = UserError(f"a.json: {text}", f"rename {text}")
    assert str(error) == f"a.json: {shown}; rename {shown}"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_no_character_of_a_user_error_is_invisible():
    error = UserError("".join(map(chr, range(0x3000))), "x")
    assert not {"Cc", "Cf", "Cs", "Zl", "Zp"} & {unicodedata.category(char) for char in str(error)}


def test_a_long_text_is_shortened_in_the_middle():
    error = UserError(f"first {'x' * 1_000_000} last", "copy it again")
    assert len(str(error)) < 5000
    assert str(error).startswith("first x")
    assert str(error).endswith("x last; copy it again")
