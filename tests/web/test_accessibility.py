"""No serious finding of axe-core on any page, in the color scheme of the browser, light and dark."""

import re
from collections.abc import Callable

import pytest
from axe_playwright_python.sync_playwright import Axe
from chat_drivers import ChatDriver
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.slow

Visit = Callable[..., ChatDriver]
SCHEMES = ("light", "dark")
# the Tab key reaches the text that can be edited in it, which axe does not take into account
EDITOR = ".cm-scroller"


def serious_findings(page: Page, scheme: str) -> list[str]:
    """Rule, element and message of each serious or critical finding; asserts the color scheme of the page."""
    color = page.evaluate("getComputedStyle(document.querySelector('.stApp, body')).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", color)[:3])) / 3
    assert brightness < 60 if scheme == "dark" else brightness > 200
    found = Axe().run(page).response
    assert len(found["passes"]) >= 10  # the page was there
    return [
        f"{page.url} {rule['id']}: {node['target']} {node['failureSummary']}"
        for rule in found["violations"]
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
        if (rule["id"], node["target"]) != ("scrollable-region-focusable", [EDITOR])
    ]


def test_a_chat_page_follows_the_color_scheme_without_a_serious_accessibility_finding(
    visit: Callable[..., ChatDriver], browser
):
    chat = visit()
    chat.ask("say # 标题\n\n**粗** [链接](https://example.com) `代码`\n\n```python\nprint(1)\n```", re.compile("print"))
    chat.enable_tools()
    chat.open_manage()
    findings = []
    for number, scheme in enumerate(SCHEMES, start=1):
        chat.page.emulate_media(color_scheme=scheme)
        chat.page.reload()
        chat.open()
        expect(chat.bubbles("user")).to_have_count(number)  # the browser's conversation is back
        chat.send("broken")  # a banner, and a question without an answer
        chat.wait_for_answer()
        expect(chat.banner()).to_be_visible()
        chat.open_manage()
        chat.act("edit", 0)
        expect(chat.edit_field()).to_be_visible()
        assert chat.page.locator(f"{EDITOR} .cm-content").evaluate_all("all => all.every((e) => e.isContentEditable)")
        findings += serious_findings(chat.page, scheme)
    assert not findings, "\n".join(findings)


def test_the_training_page_follows_the_color_scheme_without_a_serious_accessibility_finding(
    training_address: str, new_page
):
    page = new_page()
    findings = []
    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme)
        page.goto(training_address)
        expect(page.locator('[data-testid="stDataFrame"]').first).to_be_visible()
        expect(page.locator('[data-testid="stVegaLiteChart"] .marks')).to_have_count(5)
        findings += serious_findings(page, scheme)
    assert not findings, "\n".join(findings)
