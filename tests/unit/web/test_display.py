"""Raw text to the Markdown of each page."""

import pytest

from entrypoints.web.client import Growth
from entrypoints.web.display import JOINER, bubbles, fenced, for_gradio, for_streamlit, pretty, status
from entrypoints.web.talk import Talk

CODE = "```html\n<b>$x$ ![a](b)</b>\n```"


@pytest.mark.parametrize("render", [for_gradio, for_streamlit])
@pytest.mark.parametrize(
    "text", [CODE, "`<b>$x$`", "~~~\n<b>\n~~~", "``a ` <b>``", "```\n<b> never closed", "", "你好", "1 < 2"]
)
def test_code_and_plain_words_stay_as_they_are(render, text):
    assert render(text) == text


@pytest.mark.parametrize("render", [for_gradio, for_streamlit])
@pytest.mark.parametrize(
    "text", ["<b>x</b>", "![a](http://b)", "&lt;", ":red[x] :smile:", "a -> b <= c", "![a][b]\n\n[b]: c"]
)
def test_without_the_joiners_and_escapes_it_is_the_raw_text(render, text):
    assert render(text).replace("\\" + ":", ":").replace(JOINER, "") == text


def test_a_tag_an_entity_and_a_picture_are_broken_up():
    assert for_gradio("<b> &amp; ![a](b)") == f"<{JOINER}b> &{JOINER}amp; !{JOINER}[a](b)"
    assert for_streamlit("&amp; ![a](b)") == f"&{JOINER}amp; !{JOINER}[a](b)"


def test_what_streamlit_would_draw_otherwise_is_broken_up():
    assert for_streamlit(":red[x]") == f"\\:{JOINER}red[x]"
    assert for_streamlit("a -> b") == f"a -{JOINER}> b"
    assert for_streamlit("http://x:80/") == "http://x:80/"
    assert for_streamlit("12:30") == "12:30"


@pytest.mark.parametrize("written", ["$a<b$", "\\(a<b\\)"])
def test_a_formula_is_written_as_each_page_reads_it(written):
    assert for_gradio(f"是 {written}。") == "是 \\(a<b\\)。"
    assert for_streamlit(f"是 {written}。") == "是 $a<b$。"


@pytest.mark.parametrize("written", ["$$x^2$$", "\\[x^2\\]", "\\[\nx^2\n\\]"])
def test_a_formula_on_its_own_line_is_written_as_each_page_reads_it(written):
    assert for_gradio(written) == "\\[x^2\\]"
    assert for_streamlit(written).strip() == "$$\nx^2\n$$"


def test_money_is_no_formula():
    assert for_gradio("从 $5 到 $10") == "从 $5 到 $10"
    assert for_streamlit("从 $5 到 $10") == "从 \\$5 到 \\$10"


def test_a_line_end_stays_one_in_streamlit():
    assert for_streamlit("一\n二\n\n三") == "一  \n二\n\n三"


@pytest.mark.parametrize("text", ["", "`", "```", "a\n```\nb````"])
def test_a_code_block_holds_any_text(text):
    block = fenced(text)
    bar = block.split("\n")[0]
    assert block == f"{bar}\n{text}\n{bar}"
    assert bar not in text


def test_arguments_that_are_no_json_are_shown_as_they_are():
    assert pretty('{"a": "北京"}') == '{\n  "a": "北京"\n}'
    assert pretty("{a") == "{a"


def test_a_talk_is_shown_with_calls_and_results():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    talk = Talk(
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "`r`"},
        ]
    )
    shown = [(bubble.role, bubble.markdown, bubble.title) for bubble in bubbles(talk, "en", str.upper)]
    assert shown == [
        ("user", "Q", ""),
        ("assistant", "```json\n{}\n```", "Calls the tool **f**"),
        ("user", "The tool returned\n```\n`r`\n```", ""),
    ]


def test_the_status_tells_a_cut_and_what_was_left_out():
    growth = Growth("x", pieces=4, prompt_tokens=9, completion_tokens=5, finish_reason="length", dropped=2, seconds=2.0)
    assert status(Talk(last=growth), "en") == (
        "5 tokens of answer, 9 of prompt; 2.0 s, 2.5 tokens/s · The answer was cut at its limit"
        " · The window is full: oldest rounds left out: 2"
    )
    assert status(Talk(), "en") == ""
