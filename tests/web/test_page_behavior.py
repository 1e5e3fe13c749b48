"""What a person notices: focus, drafts, failed questions, banners, direction of text, dark mode."""

import re
import time
from collections.abc import Callable

import psutil
import pytest
from chat_drivers import DRIVERS, ChatDriver, GradioDriver
from playwright.sync_api import expect

pytestmark = pytest.mark.slow

Visit = Callable[..., ChatDriver]
HAS_FOCUS = "(selector) => document.activeElement === document.querySelector(selector)"
AD_PROMPT = "类型#裤*材质#牛仔*风格#简约*版型#直筒"
# fields and buttons of the closed side bar that the Tab key would reach
HIDDEN_STOPS = """(selector) => [...document.querySelectorAll(selector)].filter((e) => {
  const box = e.getBoundingClientRect();
  return e.tabIndex >= 0 && getComputedStyle(e).visibility === "visible" && box.width && box.right <= 0;
}).length"""
# the message that an event has ended arrives half a second later
LATE_ENDS = """() => {
  const request = window.fetch, encoder = new TextEncoder(), decoder = new TextDecoder();
  window.ended = [];
  window.fetch = async (resource, options) => {
    const response = await request(resource, options);
    if (!String(resource.url || resource).includes("/queue/data?")) return response;
    const late = new TransformStream({async transform(chunk, stream) {
      for (const message of decoder.decode(chunk, {stream: true}).split(/(?<=\\n\\n)/)) {
        if (message.includes("process_completed")) await new Promise((go) => setTimeout(go, 500));
        stream.enqueue(encoder.encode(message));
        setTimeout(() => window.ended.push(message), 100);  // once it is shown
      }
    }});
    return new Response(response.body.pipeThrough(late), response);
  };
}"""
HAS_ENDED = "(event) => window.ended.some((text) => text.includes(event) && text.includes('completed'))"
SIDEBARS = {"gradio": ".sidebar :is(input, textarea, button)", "streamlit": "[data-testid=stSidebar] *"}


def test_a_page_that_nobody_uses_takes_less_than_a_twentieth_of_a_cpu(ui, chat_pages):
    page = psutil.Process(chat_pages(ui).process.popen.pid)
    seconds = 3
    before = page.cpu_times()
    time.sleep(seconds)
    after = page.cpu_times()
    assert after.user + after.system - before.user - before.system < seconds / 20


def test_a_question_is_shown_as_it_was_typed(chat):
    text = f"say {AD_PROMPT} a*b*c\n    缩进  两格\n\n\t# 不是标题 $x$ \\(y\\)"
    chat.send(text)
    chat.wait_for(lambda: chat.texts("user") == [text])
    chat.wait_for_answer()


def test_an_example_of_the_empty_page_is_shown_and_sent_as_it_is_written(chat):
    chat.page.get_by_role("button").get_by_text(AD_PROMPT, exact=True).click()
    chat.wait_for(lambda: chat.texts("user") == [AD_PROMPT])
    chat.wait_for_answer()


def test_lines_of_an_answer_are_not_joined(chat):
    chat.ask("say 第一行\n    第二行\n第三行", re.compile("第一行\n\\s*第二行\n第三行"))


def test_the_focus_stays_in_the_input_field_and_a_draft_survives_the_answer(chat):
    chat.input().focus()
    chat.page.keyboard.type("count 20 0.05")
    chat.page.keyboard.press("Enter")
    chat.wait_for(lambda: "01" in chat.answer())
    chat.page.keyboard.type("draft")
    chat.wait_for(lambda: chat.answer() == "0123456789" * 2)
    chat.wait_for_answer()
    chat.page.keyboard.type("!")
    expect(chat.input()).to_have_value("draft!")


@pytest.mark.parametrize("ui", ["gradio"])
def test_text_typed_into_a_field_that_has_just_opened_is_kept(visit):
    """At the end of a generator Gradio sends the last values of its outputs again."""
    chat = visit()
    chat.ask("say 坏")
    chat.page.evaluate(LATE_ENDS)
    with chat.page.expect_response(lambda response: '"name":"edit"' in (response.request.post_data or "")) as joined:
        chat.act("edit")
    expect(chat.edit_field()).to_have_value("say 坏")
    chat.edit_field().fill("say 好")
    chat.page.wait_for_function(HAS_ENDED, arg=joined.value.json()["event_id"])
    expect(chat.edit_field()).to_have_value("say 好")
    chat.click("save")
    chat.expect_texts("say 好", "好")


@pytest.mark.parametrize("ui", ["gradio"])
def test_text_typed_into_a_field_that_was_clicked_twice_is_kept(visit):
    """Each click is followed by an event that fills the field; the second one arrives when something was typed."""
    chat = visit()
    chat.ask("say 坏")
    chat.page.evaluate(LATE_ENDS)
    filling = []

    def hold_the_second(route):
        if route.request.post_data_json["data"] == [None]:  # the only event whose one input is the session
            filling.append(route)
        if len(filling) < 2 or filling[1] is not route:
            route.continue_()

    chat.page.route("**/queue/join*", hold_the_second)
    chat.action("edit").last.evaluate("(button) => { button.click(); button.click(); }")
    expect(chat.edit_field()).to_have_value("say 坏")
    chat.edit_field().fill("say 好")
    chat.wait_for(lambda: chat.texts() and len(filling) == 2)
    with chat.page.expect_response(lambda response: response.request == filling[1].request) as joined:
        filling[1].continue_()
    chat.page.wait_for_function(HAS_ENDED, arg=joined.value.json()["event_id"])
    expect(chat.edit_field()).to_have_value("say 好")


def test_enter_during_an_answer_sends_nothing_and_keeps_the_draft(chat, scripted_api):
    chat.send("count 40 0.05")
    chat.wait_for(lambda: "01" in chat.answer())
    chat.submit("say 二")
    chat.wait_for(lambda: chat.answer() == "0123456789" * 4)
    chat.wait_for_answer()
    chat.expect_texts("count 40 0.05", "0123456789" * 4)
    expect(chat.input()).to_have_value("say 二")


SLOW_END = """
const request = window.fetch;
window.fetch = async (...call) => {
  const response = await request(...call);
  if (!response.url.includes("/queue/data")) return response;
  const ends = (chunk) => new TextDecoder().decode(chunk).includes("close_stream");
  return new Response(response.body.pipeThrough(new TransformStream({
    async transform(chunk, out) {
      if (ends(chunk)) await new Promise((resolve) => setTimeout(resolve, 600));
      out.enqueue(chunk);
    },
  })), response);
};
"""


def test_a_question_that_is_sent_while_the_stream_of_the_last_answer_closes_is_answered(chat_pages, new_page):
    """A loaded browser reads `close_stream` late; Gradio's client opens no stream for an event sent until then."""
    page = new_page()
    page.add_init_script(SLOW_END)
    chat = GradioDriver(page, chat_pages("gradio").address).open()
    for number in range(4):
        chat.ask(f"say {number}")


def test_after_stop_the_focus_is_in_the_input_field(chat, ui):
    chat.send("count 2000 0.05")
    chat.wait_for(lambda: "01" in chat.answer())
    chat.stop_button().click()
    chat.wait_for_answer()
    chat.wait_for(lambda: chat.page.evaluate(HAS_FOCUS, chat.input_selector))


def test_the_fields_of_a_closed_side_bar_are_no_tab_stops(visit, ui):
    chat = visit(width=900, height=800)
    if chat.sidebar(is_open=True).count():
        chat.close_sidebar()
    chat.wait_for(lambda: chat.page.evaluate(HIDDEN_STOPS, SIDEBARS[ui]) == 0)


def test_with_invalid_tools_the_question_stays_in_the_field_only(visit):
    chat = visit()
    chat.enable_tools()
    field = chat.setting("tools")
    field.click()
    chat.page.keyboard.press("Control+A")
    chat.page.keyboard.type("[{")  # not JSON
    field.blur()
    chat.submit("say 一")
    expect(chat.banner()).to_contain_text("工具定义第 1 行第 3 列不是有效的 JSON")
    expect(chat.input()).to_have_value("say 一")
    chat.expect_texts()


def test_a_failed_question_is_marked_and_not_sent_again(chat, scripted_api):
    chat.send("broken")
    chat.wait_for_answer()
    expect(chat.action("retry")).to_have_count(1)
    chat.ask("say 二")
    assert scripted_api.record()[-1]["turns"] == [["user", "say 二"]]
    chat.expect_texts("broken", "say 二", "二")
    expect(chat.action("retry")).to_have_count(1)


def test_an_empty_answer_is_shown(chat, scripted_api):
    chat.send("say")
    expect(chat.bubbles("assistant").last).to_contain_text("模型给出了空回答")
    chat.wait_for_answer()
    chat.ask("say 二")
    assert scripted_api.record()[-1]["turns"] == [["user", "say 二"]]


def test_waiting_shows_the_seconds(chat):
    chat.send("count 1 3")
    expect(chat.bubbles("assistant").last).to_contain_text(re.compile("正在等待模型响应… [1-9] 秒"))
    chat.wait_for_answer()


def test_a_banner_leaves_the_input_on_the_screen_follows_the_language_and_ends_with_the_chat(visit):
    chat = visit()
    chat.fill_setting("key", "sk-wrong")
    chat.send("say 一")
    expect(chat.banner()).to_contain_text("API 密钥无效")
    chat.wait_for_answer()
    box = chat.input().bounding_box()
    assert box["y"] + box["height"] <= 900
    chat.switch_language("English")
    expect(chat.banner()).to_contain_text("The API rejects this key")
    chat.clear()
    expect(chat.banner()).to_be_hidden()


def test_a_missing_key_is_another_message_than_a_wrong_one(ui, scripted_api, serve_page, new_page):
    page = serve_page(ui, "--api", scripted_api.url)
    chat = DRIVERS[ui](new_page(), page.address)
    chat.page.goto(page.address)
    expect(chat.banner()).to_contain_text("模型服务需要 API 密钥")


def test_the_document_language_follows_the_switch(chat):
    chat.wait_for(lambda: chat.page.evaluate("document.documentElement.lang") == "zh-CN")
    chat.switch_language("English")
    chat.wait_for(lambda: chat.page.evaluate("document.documentElement.lang") == "en")
    chat.switch_language("中文")
    chat.wait_for(lambda: chat.page.evaluate("document.documentElement.lang") == "zh-CN")


def test_text_from_right_to_left_is_aligned_right(chat):
    chat.ask("say مرحبا بالعالم")
    for element in (chat.bubbles("user").last, chat.bubbles("assistant").last):
        text = element.get_by_text("مرحبا").last
        style = text.evaluate("e => [getComputedStyle(e).unicodeBidi, getComputedStyle(e).textAlign]")
        assert style == ["plaintext", "start"]
