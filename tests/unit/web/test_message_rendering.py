"""Conversion of raw text to the Markdown of each page."""

import html
import re

import pytest

from entrypoints.web.client import StreamedAnswer
from entrypoints.web.message_rendering import (
    WORD_JOINER,
    plain_markdown,
    to_gradio_markdown,
    to_streamlit_markdown,
    typed_html,
)
from entrypoints.web.request_errors import ErrorMessage
from entrypoints.web.session import ChatSession
from entrypoints.web.transcript import Part, bubbles, indent_json, status_line

CODE = "```html\n<b>$x$ ![a](b)</b>\n```"


@pytest.mark.parametrize("render", [to_gradio_markdown, to_streamlit_markdown])
@pytest.mark.parametrize(
    "text", [CODE, "`<b>$x$`", "~~~\n<b>\n~~~", "``a ` <b>``", "```\n<b> never closed", "", "你好", "1 < 2"]
)
def test_code_and_plain_text_are_unchanged(render, text):
    assert render(text) == text


@pytest.mark.parametrize("render", [to_gradio_markdown, to_streamlit_markdown])
@pytest.mark.parametrize(
    "text", ["<b>x</b>", "![a](http://b)", "&lt;", ":red[x] :smile:", "a -> b <= c", "![a][b]\n\n[b]: c"]
)
def test_removing_word_joiners_and_escapes_restores_the_raw_text(render, text):
    assert render(text).replace("\\" + ":", ":").replace(WORD_JOINER, "") == text


def test_tags_entities_and_images_are_disabled():
    assert to_gradio_markdown("<b> &amp; ![a](b)") == f"<{WORD_JOINER}b> &{WORD_JOINER}amp; !{WORD_JOINER}[a](b)"
    assert to_streamlit_markdown("&amp; ![a](b)") == f"&{WORD_JOINER}amp; !{WORD_JOINER}[a](b)"


def test_streamlit_directives_and_arrows_are_disabled():
    assert to_streamlit_markdown(":red[x]") == f"\\:{WORD_JOINER}red[x]"
    assert to_streamlit_markdown("a -> b") == f"a -{WORD_JOINER}> b"
    assert to_streamlit_markdown("http://x:80/") == "http://x:80/"
    assert to_streamlit_markdown("12:30") == "12:30"


@pytest.mark.parametrize("written", ["$a<b$", "\\(a<b\\)"])
def test_an_inline_formula_has_the_delimiters_of_each_page(written):
    assert to_gradio_markdown(f"是 {written}。") == "是 \\(a<b\\)。"
    assert to_streamlit_markdown(f"是 {written}。") == "是 $a<b$。"


@pytest.mark.parametrize("written", ["$$x^2$$", "\\[x^2\\]", "\\[\nx^2\n\\]"])
def test_a_block_formula_has_the_delimiters_of_each_page(written):
    assert to_gradio_markdown(written) == "\\[x^2\\]"
    assert to_streamlit_markdown(written).strip() == "$$\nx^2\n$$"


def test_dollar_amounts_are_not_formulas():
    assert to_gradio_markdown("从 $5 到 $10") == "从 $5 到 $10"
    assert to_streamlit_markdown("从 $5 到 $10") == "从 \\$5 到 \\$10"


def test_a_line_break_is_kept_in_streamlit():
    assert to_streamlit_markdown("一\n二\n\n三") == "一  \n二\n\n三"


def test_arguments_that_are_not_json_are_unchanged():
    assert indent_json('{"a": "北京"}') == '{\n  "a": "北京"\n}'
    assert indent_json("{a") == "{a"


def test_every_single_newline_is_a_line_break_in_streamlit():
    assert to_streamlit_markdown("a\n    b \n c") == "a  \n    b  \n c"
    assert to_streamlit_markdown("`x`\ny") == "`x`  \ny"
    assert to_streamlit_markdown("\\(x\\)\ny\n`z`") == "$x$  \ny  \n`z`"


@pytest.mark.parametrize("text", ["a*b*c  d", "    x\n\n\ty", "<b>&amp;</pre>", "\\(x\\) $y$", "%%%LATEX_BLOCK_0%%%"])
def test_what_a_person_typed_is_one_line_of_html_that_shows_it_exactly(text):
    shown = typed_html(text)
    assert "\n" not in shown
    assert "\\" not in shown
    assert "%%%" not in shown
    (found,) = re.findall("<pre[^>]*>(.*)</pre>", shown)
    assert "<" not in found
    assert html.unescape(found) == text


def test_a_title_is_shown_as_it_is_in_streamlit():
    assert plain_markdown("a*b* :red[x] $1") == "a\\*b\\* \\:red\\[x\\] \\$1"


def session_of(*messages: dict) -> ChatSession:
    session = ChatSession()
    for message in messages:
        session.conversation.add(message, session.conversation.leaves[0])
    return session


def test_a_conversation_is_displayed_with_tool_calls_and_results():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    session = session_of(
        {"role": "user", "content": "*q*"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "`r`"},
        {"role": "tool", "tool_call_id": "1", "content": '{"error": "x"}'},
    )
    shown = [(bubble.role, *bubble.parts) for bubble in bubbles(session, "en")]
    assert shown == [
        ("user", Part("typed", "*q*")),
        ("assistant", Part("call", "{}", "Tool call: f")),
        ("user", Part("result", "`r`", "Tool result")),
        ("user", Part("failed_result", '{\n  "error": "x"\n}', "Tool error")),
    ]


def test_each_message_offers_what_can_be_done_with_it():
    session = session_of(
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "q2"}
    )
    session.conversation.path()[1].finish_reason = "stop"
    session.conversation.path()[2].error = ErrorMessage("busy", {"seconds": 5})
    assert [bubble.actions for bubble in bubbles(session, "en", feedback=True)] == [
        ("copy", "edit", "delete"),
        ("copy", "regenerate", "branch", "like", "dislike", "correct", "delete"),
        ("copy", "retry", "edit", "delete"),
    ]
    cut = session_of({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    cut.conversation.path()[1].finish_reason = "length"
    assert [bubble.actions for bubble in bubbles(cut, "en")][1] == (
        "copy",
        "regenerate",
        "continue",
        "branch",
        "delete",
    )


def test_the_status_line_reports_truncation_and_omitted_rounds():
    answer = StreamedAnswer(
        "x", num_deltas=4, prompt_tokens=9, completion_tokens=5, finish_reason="length", dropped_rounds=2, seconds=2.0
    )
    assert status_line(ChatSession(last_answer=answer), "en") == (
        "5 answer tokens, 9 prompt tokens; 2.0 s, 2.5 tokens/s · The answer was truncated at max tokens"
        " · Context length exceeded: 2 oldest rounds omitted"
    )
    assert status_line(ChatSession(), "en") == ""
