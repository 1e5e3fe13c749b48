"""The Security page, in both languages: every test it names exists, and every limit has the value of the code."""

import importlib
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
API = TESTS.parent / "entrypoints" / "api"
PAGES = [API / "SECURITY.md", API / "SECURITY.zh-CN.md"]
TEST_NAME = re.compile(r"`([a-z0-9_/]+\.py)::(test_[a-z0-9_]+)`")
LIMIT = re.compile(r"^\| .* \| ([0-9,]+) \| `(entrypoints[\w.]+)\.([A-Z_]+)` \|$", re.M)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_the_page_names_exists(page):
    named = TEST_NAME.findall(text_of(page))
    assert len(named) >= 35
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not (TESTS / file).is_file() or f"def {name}(" not in (TESTS / file).read_text(encoding="utf-8")
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_promise_has_a_test(page):
    promises = re.split(r"\n\| (?:limit of|上限) \|", text_of(page))[0]
    rows = [line for line in promises.splitlines() if line.startswith("| ") and "---" not in line]
    rows = [row for row in rows if row not in ("| promise | test |", "| 承诺 | 测试 |")]
    assert len(rows) >= 35
    assert [row for row in rows if not TEST_NAME.search(row)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_limit_is_that_of_the_code(page):
    limits = LIMIT.findall(text_of(page))
    assert len(limits) >= 20
    for value, module, name in limits:
        assert int(value.replace(",", "")) == getattr(importlib.import_module(module), name), name


def test_both_languages_name_the_same_tests_and_limits():
    english, chinese = map(text_of, PAGES)
    assert TEST_NAME.findall(english) == TEST_NAME.findall(chinese)
    assert LIMIT.findall(english) == LIMIT.findall(chinese)
    assert len(re.findall(r"^## ", english, re.M)) == len(re.findall(r"^## ", chinese, re.M)) >= 8


def test_every_link_leads_to_a_file():
    links = [link for page in PAGES for link in re.findall(r"\]\(([^)#]+)", text_of(page))]
    assert len(links) >= 4
    assert [link for link in links if not (API / link).resolve().exists()] == []
