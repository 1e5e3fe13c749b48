"""Every text in both languages, and the language for a browser."""

import re
import string

import pytest

from entrypoints.web.texts import LANGUAGES, TEXTS, language_of, say

FIELDS = {
    key: [{name for _, name, _, _ in string.Formatter().parse(text) if name} for text in TEXTS[key]] for key in TEXTS
}


@pytest.mark.parametrize("key", TEXTS)
def test_a_text_has_both_languages_with_the_same_fields(key):
    assert len(TEXTS[key]) == len(LANGUAGES)
    assert FIELDS[key][0] >= FIELDS[key][1]
    assert FIELDS[key][1] >= FIELDS[key][0]
    assert not re.search("[一-鿿]", TEXTS[key][1])


def test_every_text_is_said_somewhere():
    from pathlib import Path

    folder = Path(__file__).resolve().parents[3] / "entrypoints" / "web"
    code = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py") if path.stem != "texts")
    composed = {"max_tokens", "temperature", "top_p"}  # the sliders' names
    assert {key for key in TEXTS if f'"{key}"' not in code and f"'{key}'" not in code} <= composed


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
    assert language_of(preferences) == language


def test_a_text_is_filled_in():
    assert say("en", "progress", step=3, steps=9) == "Step 3 of 9"
