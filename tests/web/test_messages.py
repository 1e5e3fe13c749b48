"""What can be done at each message: edit, regenerate, branch, delete, continue, rate, correct; two models; tools."""

import json
import re
from collections.abc import Callable

import pytest
from chat_drivers import ChatDriver
from playwright.sync_api import expect
from scripted_engine import wait_until

pytestmark = pytest.mark.slow

Visit = Callable[..., ChatDriver]


def last_texts(scripted_api) -> list[str]:
    """The texts of the last prompt."""
    return [text for _, text in scripted_api.record()[-1]["turns"]]


def test_any_question_can_be_edited_and_both_versions_are_kept(chat, scripted_api):
    chat.ask("say 一")
    chat.ask("say 二")
    chat.input().fill("草稿")
    chat.act("edit", 0)
    expect(chat.edit_field()).to_have_value("say 一")
    chat.edit_field().fill("say <b>三</b>")
    chat.click("save")
    chat.expect_texts("say <b>三</b>", "<b>三</b>")
    chat.wait_for_answer()
    wait_until(lambda: last_texts(scripted_api) == ["say <b>三</b>"])
    expect(chat.input()).to_have_value("草稿")
    chat.act("previous_version", 0)
    chat.expect_texts("say 一", "一", "say 二", "二")


def test_an_answer_has_versions_and_a_draft_survives(chat, scripted_api):
    chat.ask("count 3", "012")
    chat.ask("say 二")
    chat.input().fill("草稿")
    chat.act("regenerate", 0)
    chat.expect_texts("count 3", "012")
    chat.wait_for_answer()
    expect(chat.input()).to_have_value("草稿")
    chat.act("previous_version")
    chat.expect_texts("count 3", "012", "say 二", "二")


def test_a_branch_is_another_conversation_of_the_same_title(chat, scripted_api):
    chat.ask("say 一")
    chat.ask("say 二")
    chat.act("branch", 0)
    chat.expect_texts("say 一", "一")
    chat.ask("say 三")
    wait_until(lambda: last_texts(scripted_api) == ["say 一", "一", "say 三"])
    chat.wait_for(lambda: chat.listed()[:2] == ["say 一", "say 一"])
    chat.choose_conversation("say 一", 1)
    chat.expect_texts("say 一", "一", "say 二", "二")
    chat.ask("say 四")
    wait_until(lambda: last_texts(scripted_api) == ["say 一", "一", "say 二", "二", "say 四"])


def test_deleting_a_message_asks_first(chat, scripted_api):
    chat.ask("say 一")
    chat.ask("say 二")
    chat.act("delete", 2)
    expect(chat.action("confirm_delete")).to_have_count(1)
    chat.act("cancel")
    expect(chat.action("confirm_delete")).to_have_count(0)
    chat.act("delete", 2)
    chat.act("confirm_delete")
    chat.expect_texts("say 一", "一")
    chat.ask("say 三")
    wait_until(lambda: last_texts(scripted_api) == ["say 一", "一", "say 三"])


def test_an_answer_that_was_cut_can_be_continued(visit, scripted_api):
    chat = visit()
    chat.send("count 2000 0.02")
    chat.wait_for(lambda: "0123" in chat.answer())
    chat.stop_button().click()
    chat.wait_for_answer()
    text = chat.answer()
    chat.act("continue")
    chat.wait_for_answer()
    chat.wait_for(lambda: len(chat.answer()) >= len(text))
    assert len(chat.texts()) == 2  # the same bubble
    wait_until(lambda: len(last_texts(scripted_api)) == 3)
    assert last_texts(scripted_api)[1] == text
    assert "继续" in last_texts(scripted_api)[2]


def test_ratings_and_corrections_become_training_rows(chat, ui, scripted_api):
    expect(chat.page.get_by_text("评价和修正会")).to_be_visible()
    folder = scripted_api.folder / ui

    def rows(name: str) -> list[dict]:
        file = folder / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    preferences, answers = len(rows("preferences.jsonl")), len(rows("answers.jsonl"))
    chat.ask("say 坏")
    chat.act("dislike")
    wait_until(lambda: rows("ratings.jsonl"))
    chat.edit("say 好", action="correct")
    expect(chat.bubbles("assistant").last).to_contain_text("坏")
    expect(chat.page.get_by_text("修正后的回答")).to_be_visible()
    wait_until(lambda: len(rows("preferences.jsonl")) > preferences)
    (row,) = rows("preferences.jsonl")[preferences:]
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("say 好", "坏")
    (row,) = rows("answers.jsonl")[answers:]
    assert [message["content"] for message in row["messages"]] == ["say 坏", "say 好"]


def test_two_models_answer_side_by_side(visit, scripted_api):
    chat = visit()
    answers = len(scripted_api.record())
    chat.setting("compare_model").click()
    chat.page.locator("[role=option]", has_text="poet").click()
    chat.send_to_both("say 一")
    wait_until(lambda: len(scripted_api.record()) >= answers + 2)
    assert {entry["adapter"] for entry in scripted_api.record()[-2:]} == {None, "poet"}
    chat.wait_for(lambda: chat.texts("assistant") == ["一", "一"])
    first, second = (chat.bubbles("assistant").nth(number).bounding_box() for number in (0, 1))
    assert abs(first["y"] - second["y"]) < 40
    assert second["x"] > first["x"] + 100
    expect(chat.page.get_by_text(re.compile("^poet · "))).to_be_visible()


def test_a_demo_tool_runs_and_its_cards_can_be_followed(visit, scripted_api):
    chat = visit()
    chat.enable_tools()
    script = "raw calculate\n ```python\ntool_call(expression='{}')\n```"
    chat.submit("steps " + script.format("6 * 7") + "\n---\n" + script.format("1 / 0") + "\n---\nsay 42")
    chat.wait_for(lambda: chat.answer() == "42")
    chat.wait_for_answer()
    page = chat.page
    for text in ("调用工具 calculate", '"expression": "6 * 7"', '"result": 42', "工具返回结果"):
        expect(page.get_by_text(text).first).to_be_visible()
    wait_until(lambda: [role for role, _ in scripted_api.record()[-1]["turns"]].count("observation") == 2)


def test_a_question_of_the_empty_page_is_sent_by_a_click(chat, scripted_api):
    chat.page.get_by_text("写一封请假一天的邮件").click()
    chat.wait_for(lambda: chat.texts("user") == ["写一封请假一天的邮件"])
    chat.wait_for_answer()


def test_a_document_becomes_part_of_the_question(visit, scripted_api, tmp_path):
    chat = visit()
    file = tmp_path / "报告.txt"
    file.write_text("第一行\n第二行 <b>", encoding="utf-8")
    chat.attach(file)
    expect(chat.page.get_by_text(re.compile("报告.txt"))).to_be_visible()
    chat.send("say 一")
    chat.wait_for_answer()
    wait_until(lambda: last_texts(scripted_api) == ["报告.txt:\n\n第一行\n第二行 <b>\n\nsay 一"])
    chat.wait_for(lambda: "say 一" in chat.texts("user")[-1])


def test_a_document_that_does_not_fit_or_is_no_text_is_refused(visit, tmp_path):
    chat = visit()
    long, binary = tmp_path / "长.txt", tmp_path / "图.txt"
    long.write_text("今天天气很好。" * 2000, encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\x00")
    for file, text in ((long, "上下文长度"), (binary, "UTF-8")):
        chat.attach(file)
        if chat.attaches_on_submit:
            chat.submit("说")
        expect(chat.banner()).to_contain_text(text)
    expect(chat.bubbles("user")).to_have_count(0)
