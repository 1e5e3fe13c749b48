"""The texts of the pages in both languages, and the choice of language for a browser."""

import re
import string
from pathlib import Path

import pytest

from entrypoints.web.i18n import LANGUAGES, TEXTS, negotiate_language, translate

PLACEHOLDERS = {
    key: [{name for _, name, _, _ in string.Formatter().parse(text) if name} for text in TEXTS[key]] for key in TEXTS
}


@pytest.mark.parametrize("key", TEXTS)
def test_a_text_has_both_languages_with_the_same_placeholders(key):
    assert len(TEXTS[key]) == len(LANGUAGES)
    assert sorted(PLACEHOLDERS[key][0]) == sorted(PLACEHOLDERS[key][1])
    assert not re.search("[一-鿿]", TEXTS[key][1])


def test_no_page_replaces_a_text_of_another():
    """A dictionary keeps only the last of two entries with the same key."""
    folder = Path(__file__).resolve().parents[3] / "entrypoints" / "web"
    files = [folder / "i18n.py", *folder.rglob("texts.py")]
    keys = re.findall(r'^    "(\w+)": ', "".join(file.read_text(encoding="utf-8") for file in files), re.M)
    assert len(files) >= 2
    assert len(keys) == len(set(keys)) == len(TEXTS)


def test_every_text_is_used():
    folder = Path(__file__).resolve().parents[3] / "entrypoints" / "web"
    files = [path for path in folder.rglob("*.py") if path.stem not in ("i18n", "texts")]
    code = "".join(path.read_text(encoding="utf-8") for path in files)
    assert {key for key in TEXTS if f'"{key}"' not in code and f"'{key}'" not in code} == set()


@pytest.mark.parametrize(
    ("preferences", "language"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("zh-TW", "zh"),
        ("en-US,en;q=0.9,zh;q=0.8", "en"),
        ("fr-FR, zh;q=0.5, en;q=0.4", "zh"),
        ("en;q=0.1, zh", "zh"),
        ("fr", "en"),
        ("", "en"),
        (None, "en"),
        ("zh;q=x, en", "en"),
        (";q=,,;;q=1", "en"),
    ],
)
def test_the_language_is_the_one_the_browser_prefers(preferences, language):
    assert negotiate_language(preferences) == language


def test_placeholders_of_a_text_are_filled_in():
    assert translate("en", "progress", step=3, total=9) == "Step 3 of 9"
