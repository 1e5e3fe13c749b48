"""Sizes in messages."""

import re
from pathlib import Path

import pytest

from entrypoints.sizes import format_size

PACKAGE = Path(__file__).resolve().parents[2] / "entrypoints"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (99, "99 bytes"),
        (100, "0.1 kB"),
        (64_000, "64.0 kB"),
        (1_000_000, "1.0 MB"),
        (99_000_000, "99.0 MB"),
        (100_000_000, "0.1 GB"),
        (12_487_168_000, "12.5 GB"),
    ],
)
def test_a_size_has_a_unit_in_which_it_is_not_zero(size, text):
    assert format_size(size) == text


def test_a_size_can_have_more_digits():
    assert format_size(24_974_336_000, 2) == "24.97 GB"
    assert format_size(1_234_567, 2) == "1.23 MB"


def test_no_message_writes_gigabytes_by_itself():
    """A tiny model has 0.0 GB."""
    found = [file.name for file in PACKAGE.rglob("*.py") if re.search(r":\.\df\} GB", file.read_text(encoding="utf-8"))]
    assert sorted(found) == ["checks.py"], "the disk that the 6B needs, without digits"
