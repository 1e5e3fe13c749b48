"""Conversations and settings that the browser keeps."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_drivers import DRIVERS, ChatDriver
from playwright.sync_api import expect

pytestmark = pytest.mark.slow

Visit = Callable[..., ChatDriver]


@pytest.fixture
def kept(visit: Visit) -> ChatDriver:
    """A visitor with two conversations."""
    chat = visit()
    chat.ask("say 苹果")
    chat.open_sidebar()
    chat.clear()
    chat.ask("say *梨*", "梨")
    chat.wait_for(lambda: chat.listed() == ["say *梨*", "say 苹果"])
    return chat


def stored(chat: ChatDriver) -> list[str]:
    """The conversations in the storage of the browser."""
    return chat.page.evaluate("Object.keys(localStorage).filter((name) => name.includes(':c:'))")


def test_conversations_are_kept_over_a_reload_and_can_be_continued(kept, scripted_api, ui):
    kept.wait_for(lambda: len(stored(kept)) == 2)
    kept.page.reload()
    kept.open()
    kept.expect_texts("say *梨*", "梨")
    kept.choose_conversation("say 苹果")
    kept.expect_texts("say 苹果", "苹果")
    kept.ask("say 桃")
    assert [text for _, text in scripted_api.record()[-1]["turns"]] == ["say 苹果", "苹果", "say 桃"]
    tab = DRIVERS[ui](kept.page.context.new_page(), kept.address).open()  # a new tab begins a new conversation
    tab.wait_for(lambda: tab.listed() == ["say 苹果", "say *梨*"])
    tab.expect_texts()
    tab.ask("say 葡萄")
    tab.wait_for(lambda: tab.listed() == ["say 葡萄", "say 苹果", "say *梨*"])


def test_a_conversation_is_found_renamed_and_deleted(kept):
    search = kept.field("search")
    search.fill("苹果")
    search.press("Enter")
    kept.wait_for(lambda: kept.listed() == ["say 苹果"])
    search.fill("")
    search.press("Enter")
    kept.open_manage()
    title = kept.field("rename")
    title.fill("水果")
    title.press("Enter")
    kept.wait_for(lambda: kept.listed() == ["水果", "say 苹果"])
    kept.click("delete_conversation")
    kept.click("confirm_delete_conversation")
    kept.wait_for(lambda: kept.listed() == ["say 苹果"])
    kept.expect_texts()
    kept.wait_for(lambda: len(stored(kept)) == 1)


def test_conversations_are_exported_and_imported_by_another_visitor_who_sees_none_of_them(kept, visit, tmp_path):
    kept.open_manage()
    files: dict[str, Path] = {}
    for name in ("export_markdown", "export_all"):
        with kept.page.expect_download() as download:
            kept.click(name)
        files[name] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[name])
    assert files["export_markdown"].read_text(encoding="utf-8") == (
        "# say *梨*\n\n## 用户\n\nsay *梨*\n\n## 助手\n\n*梨*\n"
    )
    assert len(json.loads(files["export_all"].read_text(encoding="utf-8"))) == 2
    other = visit()
    other.expect_texts()
    assert other.listed() == []
    other.open_manage()
    other.import_file(files["export_all"])
    other.wait_for(lambda: sorted(other.listed()) == ["say *梨*", "say 苹果"])
    broken = tmp_path / "broken.json"
    broken.write_text('{"nodes": 1}')
    other.import_file(broken)
    expect(other.banner()).to_contain_text("不是从本页面导出的对话")
    assert len(other.listed()) == 2


def test_settings_language_and_saved_prompts_are_remembered(visit, ui):
    chat = visit()
    chat.fill_setting("system", "你是诗人")
    chat.click("save_prompt")
    expect(chat.button("remove_prompt")).to_be_visible()
    chat.switch_language("English")
    expect(chat.button("clear")).to_have_text("New chat")
    for text in ("你是诗人", r"\"en\""):
        chat.wait_for(lambda text=text: text in str(chat.page.evaluate("JSON.stringify(localStorage)")))
    chat.page.reload()
    chat.open()
    expect(chat.button("clear")).to_have_text("New chat")
    expect(chat.setting("system")).to_have_value("你是诗人")
    expect(chat.button("remove_prompt")).to_be_visible()
    assert chat.page.evaluate("document.documentElement.lang") == "en"
