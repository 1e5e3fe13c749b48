"""The command reference equals what is generated from the help texts and settings."""

from pathlib import Path

import pytest
from reference_docs import COMMAND, REFERENCE, TRAINING_GUIDES, render, with_plan_table

from entrypoints.__main__ import COMMANDS

CHINESE = REFERENCE.with_name("README.zh-CN.md")


def test_the_command_reference_is_up_to_date():
    if REFERENCE.read_text(encoding="utf-8") != render():
        pytest.fail(f"{REFERENCE} differs from the help texts and settings: run `{COMMAND}`")


def test_the_table_of_methods_and_cards_is_what_the_code_computes():
    for guide in TRAINING_GUIDES:
        text = guide.read_text(encoding="utf-8")
        if text != with_plan_table(text):
            pytest.fail(f"the table in {guide} differs from the memory estimate: run `{COMMAND}`")


def test_the_command_reference_does_not_depend_on_the_machine(monkeypatch):
    """Neither the width of the terminal, nor the environment, nor the home folder is part of a help text."""
    text = render()
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example.com")
    assert render() == text
    assert str(Path.home()) not in text


def test_the_chinese_page_lists_every_command():
    text = CHINESE.read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"`glm {name}`" not in text] == []
