"""Both chat pages in a real browser, connected to the real API with a scripted engine."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_drivers import ChatDriver
from playwright.sync_api import expect
from processes import PAGE_KEY, SLOW_KEYS
from scripted_engine import wait_until

from entrypoints.chat_format.sampling import Sampling
from entrypoints.dataset.columns import Columns
from entrypoints.dataset.reader import examples, read_rows

pytestmark = pytest.mark.slow

Visit = Callable[..., ChatDriver]
XSS = (
    "<script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "<svg/onload=window.hacked=1>",
    "[x](javascript:window.hacked=1)",
    "![x](http://evil.example/x.png)",
    "<iframe src=http://evil.example></iframe>",
    "&lt;b&gt;",
)


def test_an_answer_is_shown_with_its_tokens_and_speed(chat, scripted_api):
    chat.ask("say 你好，世界")
    expect(chat.status()).to_contain_text(
        re.compile(r"回答 \d+ 个 token，提示词 \d+ 个 token；用时 [\d.]+ 秒，[\d.]+ token/秒")
    )
    assert scripted_api.record()[-1]["turns"] == [["user", "say 你好，世界"]]


def test_an_answer_is_streamed_and_can_be_stopped(chat, scripted_api):
    answers = len(scripted_api.record())
    chat.send("count 2000 0.05")
    chat.wait_for(lambda: "0123" in chat.answer())
    early = len(chat.answer())
    chat.wait_for(lambda: len(chat.answer()) > early)
    chat.stop_button().click()
    expect(chat.status()).to_contain_text("已停止")
    wait_until(lambda: len(scripted_api.record()) > answers)
    assert scripted_api.record()[-1]["said"] < 2000  # the model stopped too
    chat.ask("say 继续")
    partial = scripted_api.record()[-1]["turns"][1][1]
    assert len(partial) > early
    chat.expect_texts("count 2000 0.05", partial, "say 继续", "继续")


def test_the_model_receives_the_whole_conversation(chat, scripted_api):
    chat.ask("say 一")
    chat.ask("say 二")
    assert scripted_api.record()[-1]["turns"] == [["user", "say 一"], ["assistant", "一"], ["user", "say 二"]]


def test_regenerate_sends_the_same_question_again(chat, scripted_api):
    chat.ask("say 一")
    answers = len(scripted_api.record())
    chat.act("regenerate")
    wait_until(lambda: len(scripted_api.record()) > answers)
    chat.expect_texts("say 一", "一")
    chat.wait_for_answer()
    assert scripted_api.record()[-1]["turns"] == [["user", "say 一"]]


def test_a_new_chat_starts_without_the_messages_of_the_last_one(chat, scripted_api):
    chat.ask("say 一")
    chat.clear()
    chat.ask("say 二")
    assert scripted_api.record()[-1]["turns"] == [["user", "say 二"]]


def test_models_and_adapters_are_offered_and_the_settings_reach_the_model(visit, scripted_api):
    chat = visit()
    assert chat.models() == ["demo", "poet（demo 的适配器）"]
    chat.fill_setting("system", "你是诗人")
    chat.choose_model("poet")
    chat.ask("say 一")
    last = scripted_api.record()[-1]
    assert last["turns"][0] == ["system", "你是诗人"]
    assert last["adapter"] == "poet"
    assert (last["temperature"], last["top_p"]) == (Sampling.temperature, Sampling.top_p)


def test_the_model_receives_raw_text_and_the_page_shows_it_escaped(chat, scripted_api):
    """The text that the widget displays is never sent back to the model."""
    text = 'say <b>x</b> & `y` **z** "q" 1 < 2 &amp; :smile: \\(a_1\\)'
    chat.ask(text, re.compile("smile"))
    chat.ask("say 二")
    turns = scripted_api.record()[-1]["turns"]
    assert turns[0] == ["user", text]
    assert turns[1] == ["assistant", text.removeprefix("say ")]
    chat.wait_for(lambda: chat.texts("user")[0] == text)  # as it was typed
    assert chat.bubbles("user").first.locator("b, strong, code, .katex").count() == 0


def test_script_injection_is_shown_as_text(chat):
    shown = [re.escape(text) for text in XSS if not text.startswith(("[", "!"))]
    chat.ask("say " + " ".join(XSS), re.compile(".*".join(shown), re.DOTALL))
    assert chat.page.evaluate("window.hacked") is None
    assert chat.page.locator("img[src*=evil], iframe[src*=evil], a[href^=javascript]").count() == 0


def test_markdown_code_and_formulas_are_rendered(chat):
    lines = [
        "say 标题",
        "",
        "- **粗**",
        "",
        "```python",
        "print('<b>')",
        "```",
        "",
        "$a<b$ \\(\\frac{1}{2}\\)",
        "",
        "\\[x^2\\]",
    ]
    chat.send("\n".join(lines))
    answer = chat.bubbles("assistant").last
    expect(answer.locator("li strong")).to_have_text("粗")
    expect(answer.locator("pre code")).to_contain_text("print('<b>')")
    expect(answer.locator(".katex")).to_have_count(3)
    expect(answer.locator(".katex-error")).to_have_count(0)
    chat.wait_for_answer()


def test_the_language_is_that_of_the_browser_and_can_be_switched(chat, visit):
    english = visit(locale="en-US")
    expect(english.button("clear")).to_have_text("New chat")
    expect(chat.button("clear")).to_have_text("新对话")
    chat.ask("say 一")
    chat.switch_language("English")
    expect(chat.button("clear")).to_have_text("New chat")
    expect(chat.status()).to_contain_text("answer tokens")
    chat.expect_texts("say 一", "一")  # the conversation is kept
    expect(english.button("clear")).to_have_text("New chat")
    chat.switch_language("中文")
    expect(chat.button("clear")).to_have_text("新对话")
    expect(chat.status()).to_contain_text("提示词")


def test_the_conversations_of_two_visitors_at_once_are_separate(chat, visit, scripted_api):
    one, two = chat, visit(locale="en-US")
    one.send("count 60 0.05")
    two.ask("say BBB222")
    one.wait_for(lambda: one.answer() == "0123456789" * 6)
    one.wait_for_answer()
    one.ask("say AAA111")
    two.ask("say again")
    assert "BBB222" not in "".join(one.texts())
    assert "AAA111" not in "".join(two.texts())
    assert [entry["turns"] for entry in scripted_api.record()[-2:]] == [
        [["user", "count 60 0.05"], ["assistant", "0123456789" * 6], ["user", "say AAA111"]],
        [["user", "say BBB222"], ["assistant", "BBB222"], ["user", "say again"]],
    ]


def test_a_visitor_who_leaves_stops_the_model(visit, scripted_api):
    answers = len(scripted_api.record())
    chat = visit()
    chat.send("count 2000 0.05")
    chat.wait_for(lambda: "01" in chat.answer())
    chat.page.close()
    wait_until(lambda: len(scripted_api.record()) > answers)
    assert scripted_api.record()[-1]["said"] < 2000


def test_a_tool_call_is_shown_and_its_result_is_typed_in(visit, scripted_api):
    chat = visit()
    chat.enable_tools()
    chat.submit("raw get_weather\n ```python\ntool_call(city='北京')\n```")
    expect(chat.bubbles("assistant").last).to_contain_text("get_weather")
    expect(chat.bubbles("assistant").last).to_contain_text('"city": "北京"')
    chat.wait_for_answer()
    expect(chat.input()).to_have_attribute("placeholder", "输入 get_weather 的返回结果，按回车发送")
    chat.ask("晴，31度", "工具说：晴，31度")
    last = scripted_api.record()[-1]["turns"]
    assert [role for role, _ in last] == ["system", "user", "assistant", "observation"]
    assert "get_weather" in last[0][1]
    assert last[2][1].startswith("get_weather")


def test_the_conversation_is_exported_as_training_rows(chat, tmp_path):
    chat.ask("say 一 <b>")
    chat.ask("say 二")
    chat.open_manage()
    with chat.page.expect_download() as download:
        chat.click("export")
    file = Path(tmp_path / "rows.jsonl")
    download.value.save_as(file)
    used, skipped = examples(read_rows(file), Columns(history="history"), max_skipped=0)
    assert skipped == []
    assert [(row.prompt, row.response, row.history) for row in used] == [("say 二", "二", [("say 一 <b>", "一 <b>")])]


def test_the_page_recovers_without_a_reload_when_a_killed_server_is_back(chat, scripted_api):
    chat.ask("say 一")
    scripted_api.kill()
    try:
        chat.send("say 二")
        expect(chat.banner()).to_contain_text("无法连接模型服务")
        chat.wait_for_answer()
    finally:
        scripted_api.start()
    expect(chat.banner()).to_be_hidden()  # the page retries by itself
    chat.act("retry")
    chat.expect_texts("say 一", "一", "say 二", "二")
    chat.wait_for_answer()
    assert scripted_api.record()[-1]["turns"] == [["user", "say 一"], ["assistant", "一"], ["user", "say 二"]]


def test_an_invalid_key_and_an_exhausted_rate_limit_show_a_banner(visit, ui):
    chat = visit()
    chat.fill_setting("key", "sk-wrong")
    expect(chat.banner()).to_contain_text("API 密钥无效")
    chat.send("say 一")
    chat.wait_for_answer()
    expect(chat.banner()).to_contain_text("API 密钥无效")
    chat.fill_setting("key", SLOW_KEYS[ui])
    expect(chat.banner()).to_be_hidden()  # listing the models used up its limit
    chat.act("retry")
    expect(chat.banner()).to_contain_text(re.compile(r"繁忙，请在 \d+ 秒后重试"))
    chat.wait_for_answer()
    chat.fill_setting("key", PAGE_KEY)
    expect(chat.banner()).to_be_hidden()
    chat.act("retry")
    chat.expect_texts("say 一", "一")
    chat.wait_for_answer()
    expect(chat.banner()).to_be_hidden()


def test_copying_returns_the_raw_text(chat):
    chat.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    text = "<b>x</b> & ![y](z) `<i>`"
    chat.ask(f"say {text}", re.compile("<i>"))
    chat.act("copy")
    wait_until(lambda: chat.page.evaluate("navigator.clipboard.readText()") == text)
    chat.act("copy", 0)
    wait_until(lambda: chat.page.evaluate("navigator.clipboard.readText()") == f"say {text}")


def test_a_page_contacts_no_other_host(chat, chat_pages, ui):
    """The requests of the browser are checked after each test, by the fixtures chat and new_page."""
    chat.ask("say 一")
    assert chat_pages(ui).outside.read_text() == ""
