"""Both chat pages in a real browser, in front of the real API with a scripted engine."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from chat_drivers import ChatDriver
from playwright.sync_api import expect
from processes import PAGE_KEY, SLOW_KEYS
from scripted_engine import wait_until

from entrypoints.dataset.reading import Columns, examples, read_rows
from entrypoints.sampling import Sampling

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
        re.compile(r"回答 \d+ 个 token，提示 \d+ 个；[\d.]+ 秒，每秒 [\d.]+ 个 token")
    )
    assert scripted_api.record()[-1]["turns"] == [["user", "say 你好，世界"]]


def test_an_answer_grows_and_can_be_stopped_midway(chat, scripted_api):
    answers = len(scripted_api.record())
    chat.send("count 2000 0.05")
    chat.await_text(lambda: "0123" in chat.answer())
    early = len(chat.answer())
    chat.await_text(lambda: len(chat.answer()) > early)
    chat.stop_button().click()
    expect(chat.status()).to_contain_text("已停止")
    wait_until(lambda: len(scripted_api.record()) > answers)
    assert scripted_api.record()[-1]["said"] < 2000  # the model stopped too
    chat.ask("say 继续")
    said = scripted_api.record()[-1]["turns"][1][1]
    assert len(said) > early
    chat.shows("count 2000 0.05", said, "say 继续", "继续")


def test_the_model_is_told_the_whole_talk(chat, scripted_api):
    chat.ask("say 一")
    chat.ask("say 二")
    assert scripted_api.record()[-1]["turns"] == [["user", "say 一"], ["assistant", "一"], ["user", "say 二"]]


def test_regenerate_asks_the_same_question_anew(chat, scripted_api):
    chat.ask("say 一")
    answers = len(scripted_api.record())
    chat.press("regenerate")
    wait_until(lambda: len(scripted_api.record()) > answers)
    chat.shows("say 一", "一")
    assert scripted_api.record()[-1]["turns"] == [["user", "say 一"]]


def test_the_last_question_can_be_edited(chat, scripted_api):
    chat.ask("say 一")
    chat.ask("say <b>二</b>")
    chat.press("edit")
    expect(chat.page.locator(chat.field)).to_have_value("say <b>二</b>")
    chat.shows("say 一", "一")
    chat.ask("say 三")
    assert [text for _, text in scripted_api.record()[-1]["turns"]] == ["say 一", "一", "say 三"]


def test_clear_starts_anew(chat, scripted_api):
    chat.ask("say 一")
    chat.press("clear")
    expect(chat.of("user", "assistant")).to_have_count(0)
    chat.ask("say 二")
    assert scripted_api.record()[-1]["turns"] == [["user", "say 二"]]


def test_the_settings_reach_the_model(chat, scripted_api):
    chat.fill("system", "你是诗人")
    chat.choose_model("poet")
    chat.ask("say 一")
    last = scripted_api.record()[-1]
    assert last["turns"][0] == ["system", "你是诗人"]
    assert last["adapter"] == "poet"
    assert (last["temperature"], last["top_p"]) == (Sampling.temperature, Sampling.top_p)


def test_models_and_adapters_are_offered(chat):
    assert chat.models() == ["toy", "poet（toy 的适配器）"]


def test_the_model_reads_raw_text_and_the_page_shows_it_escaped(chat, scripted_api):
    """E4: what the widget makes of a text never goes back."""
    text = 'say <b>x</b> & `y` **z** "q" 1 < 2 &amp; :smile: \\(a_1\\)'
    chat.ask(text, re.compile("smile"))
    chat.ask("say 二")
    turns = scripted_api.record()[-1]["turns"]
    assert turns[0] == ["user", text]
    assert turns[1] == ["assistant", text.removeprefix("say ")]
    chat.await_text(lambda: '<b>x</b> & y z "q" 1 < 2 &amp; :smile:' in chat.texts("user")[0])
    assert chat.of("user").first.locator("b").count() == 0


def test_attacks_are_shown_as_text(chat):
    shown = [re.escape(text) for text in XSS if not text.startswith(("[", "!"))]
    chat.ask("say " + " ".join(XSS), re.compile(".*".join(shown), re.DOTALL))
    assert chat.page.evaluate("window.hacked") is None
    assert chat.page.locator("img[src*=evil], iframe[src*=evil], a[href^=javascript]").count() == 0


def test_markdown_code_and_formulas_are_drawn(chat):
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
    body = chat.of("assistant").last
    expect(body.locator("li strong")).to_have_text("粗")
    expect(body.locator("pre code")).to_contain_text("print('<b>')")
    expect(body.locator(".katex")).to_have_count(3)
    expect(body.locator(".katex-error")).to_have_count(0)


def test_the_language_is_the_browsers_and_can_be_switched(visit):
    english = visit(locale="en-US")
    expect(english.button("regenerate")).to_have_text("Regenerate")
    chinese = visit(locale="zh-CN")
    expect(chinese.button("regenerate")).to_have_text("重新生成")
    chinese.ask("say 一")
    chinese.language("English")
    expect(chinese.button("regenerate")).to_have_text("Regenerate")
    expect(chinese.status()).to_contain_text("tokens of answer")
    chinese.shows("say 一", "一")  # the talk stays
    expect(english.button("regenerate")).to_have_text("Regenerate")


def test_a_reload_starts_a_new_talk(chat, scripted_api):
    chat.ask("say 旧事")
    chat.page.reload()
    chat.open()
    chat.shows()
    chat.ask("say 新事")
    assert scripted_api.record()[-1]["turns"] == [["user", "say 新事"]]


def test_two_visitors_at_once_never_see_each_other(visit, scripted_api):
    """E1."""
    one, two = visit(), visit(locale="en-US")
    one.send("count 60 0.05")
    two.ask("say BBB222")
    one.await_text(lambda: one.answer() == "0123456789" * 6)
    one.ask("say AAA111")
    two.ask("say again")
    assert "BBB222" not in "".join(one.texts())
    assert "AAA111" not in "".join(two.texts())
    told = json.dumps([entry["turns"] for entry in scripted_api.record()[-2:]])
    assert not ("AAA111" in told.split("]]")[0] and "BBB222" in told.split("]]")[0])
    assert scripted_api.record()[-1]["turns"] == [
        ["user", "say BBB222"],
        ["assistant", "BBB222"],
        ["user", "say again"],
    ]


def test_a_visitor_who_leaves_frees_the_model(visit, scripted_api):
    answers = len(scripted_api.record())
    chat = visit()
    chat.send("count 2000 0.05")
    chat.await_text(lambda: "01" in chat.answer())
    chat.page.close()
    wait_until(lambda: len(scripted_api.record()) > answers)
    assert scripted_api.record()[-1]["said"] < 2000


def test_a_tool_call_is_shown_and_its_result_typed_in(chat, scripted_api):
    chat.tool_mode()
    chat.enter("raw get_weather\n ```python\ntool_call(city='北京')\n```")
    expect(chat.of("assistant").last).to_contain_text("get_weather")
    expect(chat.of("assistant").last).to_contain_text('"city": "北京"')
    chat.wait()
    expect(chat.page.locator(chat.field)).to_have_attribute("placeholder", "输入 get_weather 的返回结果，回车发送")
    chat.ask("晴，31度", "工具说：晴，31度")
    last = scripted_api.record()[-1]["turns"]
    assert [role for role, _ in last] == ["system", "user", "assistant", "observation"]
    assert "get_weather" in last[0][1]
    assert last[2][1].startswith("get_weather")


def test_tools_that_are_no_json_are_refused_with_a_banner(chat, ui):
    chat.tool_mode()
    box = chat.setting("tools")
    box.click()
    chat.page.keyboard.press("Control+A")
    chat.page.keyboard.type("[{")
    box.blur()
    chat.enter("say 一")
    expect(chat.banner()).to_contain_text("工具定义有误")


def test_the_conversation_is_exported_as_rows_for_training(chat, tmp_path):
    chat.ask("say 一 <b>")
    chat.ask("say 二")
    with chat.page.expect_download() as download:
        chat.press("export")
    file = Path(tmp_path / "rows.jsonl")
    download.value.save_as(file)
    used, skipped = examples(read_rows(file), Columns(history="history"), strict=True)
    assert skipped == []
    assert [(row.prompt, row.response, row.history) for row in used] == [("say 二", "二", [("say 一 <b>", "一 <b>")])]


def test_an_api_that_was_killed_and_came_back_is_met_without_a_reload(chat, scripted_api):
    chat.ask("say 一")
    scripted_api.kill()
    try:
        chat.send("say 二")
        expect(chat.banner()).to_contain_text("连不上模型服务")
        chat.wait()
    finally:
        scripted_api.start()
    expect(chat.banner()).to_be_hidden()  # the page looks again by itself
    chat.press("regenerate")
    chat.shows("say 一", "一", "say 二", "二")
    assert scripted_api.record()[-1]["turns"] == [["user", "say 一"], ["assistant", "一"], ["user", "say 二"]]


def test_a_wrong_key_and_a_used_up_one_are_said_in_a_banner(chat, ui):
    chat.fill("key", "sk-wrong")
    expect(chat.banner()).to_contain_text("需要有效的 API 密钥")
    chat.send("say 一")
    chat.wait()
    expect(chat.banner()).to_contain_text("需要有效的 API 密钥")
    chat.fill("key", SLOW_KEYS[ui])
    expect(chat.banner()).to_be_hidden()  # looking for the models has used it up
    chat.press("regenerate")
    expect(chat.banner()).to_contain_text(re.compile(r"繁忙，请 \d+ 秒后重试"))
    chat.wait()
    chat.fill("key", PAGE_KEY)
    expect(chat.banner()).to_be_hidden()
    chat.press("regenerate")
    chat.shows("say 一", "一")
    chat.wait()
    expect(chat.banner()).to_be_hidden()


def test_copying_gives_back_what_was_said(visit, ui):
    chat = visit(permissions=["clipboard-read", "clipboard-write"])
    text = "<b>x</b> & ![y](z) `<i>`"
    chat.ask(f"say {text}", re.compile("<i>"))
    if ui == "gradio":
        chat.page.locator('[aria-label="Copy message"]').last.click()
    else:
        chat.page.locator('[data-testid="stPopoverButton"]').last.click()
        chat.page.locator('[data-testid="stCode"]').last.hover()
        chat.page.locator('[aria-label="Copy to clipboard"]').last.click()
    wait_until(lambda: chat.page.evaluate("navigator.clipboard.readText()") == text)


def test_no_page_and_no_server_of_one_asked_another_host(chat, chat_pages, ui):
    """The browser's side is checked after each test, in new_page."""
    chat.ask("say 一")
    assert chat_pages(ui).outside.read_text() == ""
