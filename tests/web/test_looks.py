"""How the pages look on a wide and a narrow screen, checked; the screenshots are artefacts.

The pictures of the README are made here too: GLM_PICTURES=1 renews tests/web/pictures.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_drivers import DRIVERS
from PIL import Image
from playwright.sync_api import Locator, Page, expect
from processes import PAGE_KEY, SUPPORT, Process, free_port
from scripted_engine import wait_until

SIZES = {"wide": (1400, 900), "narrow": (320, 640)}
PICTURES = Path(__file__).parent / "pictures"
# Of two things to click or type into, neither may lie on the other; and each must be inside the screen's width.
COLLISIONS = """() => {
  const kinds = "button, textarea, input:is([type=text], [type=number], [type=password]), [role=slider], h2, h4";
  const seen = [...document.querySelectorAll(kinds)].filter((e) => {
    const box = e.getBoundingClientRect(), style = getComputedStyle(e);
    if (!box.width || !box.height || style.visibility !== "visible" || style.opacity === "0") return false;
    const x = box.x + box.width / 2, y = box.y + box.height / 2;
    if (x < 0 || x > innerWidth || y < 0 || y > innerHeight) return false;
    const top = document.elementFromPoint(x, y);
    return top && (e.contains(top) || top.contains(e));
  });
  const name = (e) => `${e.tagName} ${e.innerText || e.getAttribute("aria-label") || e.className}`.slice(0, 60);
  const found = [];
  for (const [i, a] of seen.entries()) {
    const p = a.getBoundingClientRect();
    if (p.right > innerWidth + 1 || p.left < -1) found.push(`${name(a)} leaves the screen`);
    for (const b of seen.slice(i + 1)) {
      if (a.contains(b) || b.contains(a)) continue;
      const q = b.getBoundingClientRect();
      const width = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const height = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      const field = a.closest("label, [data-baseweb], .stTextInput, .stChatInput, #question, .wrap");
      if (width > 2 && height > 2 && !(field && field.contains(b))) found.push(`${name(a)} lies on ${name(b)}`);
    }
  }
  return found;
}"""
# Two characters that no font has are drawn as the same box.
DRAWS_CHINESE = """() => {
  const draw = (character) => {
    const canvas = document.createElement("canvas");
    const context = canvas.getContext("2d");
    context.font = `32px ${getComputedStyle(document.body).fontFamily}`;
    context.fillText(character, 4, 36);
    return canvas.toDataURL();
  };
  return new Set(["你", "好", "鱻", "\\u{10FFFF}"].map(draw)).size === 4;
}"""


def check(page: Page) -> None:
    """Nothing overlaps, nothing is wider than the screen, Chinese is drawn, once the page has come to rest."""
    comes_true(lambda: page.evaluate("document.documentElement.scrollWidth <= innerWidth"))
    comes_true(lambda: page.evaluate(COLLISIONS) == [], lambda: page.evaluate(COLLISIONS))
    assert page.evaluate(DRAWS_CHINESE)


def comes_true(condition: Callable[[], bool], instead: Callable[[], object] = lambda: "") -> None:
    """Wait for it; AssertionError with what there is instead."""
    try:
        wait_until(condition, 20)
    except AssertionError as error:
        raise AssertionError(instead()) from error


def below(place: Locator) -> float:
    """Where it ends, in pixels from the top of the screen."""
    box = place.bounding_box()
    return box["y"] + box["height"]


def keep(page: Page, file: Path, picture: bool) -> None:
    page.screenshot(path=file)
    if picture and os.environ.get("GLM_PICTURES"):
        PICTURES.mkdir(exist_ok=True)
        Image.open(file).convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(
            PICTURES / file.name, optimize=True
        )


@pytest.mark.parametrize("size", SIZES)
def test_a_chat_page_is_in_order(size, ui, visit, shots):
    chat = visit(width=SIZES[size][0], height=SIZES[size][1])
    page = chat.page
    check(page)
    keep(page, shots / f"{ui}-{size}-empty.png", False)
    chat.ask("你好", re.compile("部署在本机"))
    chat.ask("用 Python 写一个求平方和的函数，并给出公式", re.compile("squares"))
    expect(chat.of("assistant").last.locator("pre code")).to_contain_text("squares")
    check(page)
    comes_true(lambda: below(page.locator(chat.field)) <= SIZES[size][1], lambda: "the field has left the screen")
    comes_true(
        lambda: 0 < below(chat.of("assistant").last) <= page.locator(chat.field).bounding_box()["y"],
        lambda: "the page does not follow the answer",
    )
    keep(page, shots / f"{ui}-{size}-talk.png", size == "wide")
    chat.setting("system")
    check(page)
    keep(page, shots / f"{ui}-{size}-settings.png", False)


@pytest.mark.parametrize("size", SIZES)
def test_a_banner_and_a_tool_call_are_in_order(size, ui, visit, shots):
    chat = visit(width=SIZES[size][0], height=SIZES[size][1], locale="en-US")
    page = chat.page
    chat.tool_mode()
    check(page)
    keep(page, shots / f"{ui}-{size}-tools.png", False)
    if size == "narrow":
        chat.close_settings()
    chat.enter("raw get_weather\n ```python\ntool_call(city='北京', days=3)\n```")
    expect(chat.of("assistant").last).to_contain_text("get_weather")
    chat.wait()
    chat.ask("晴，31度", "工具说：晴，31度")
    check(page)
    keep(page, shots / f"{ui}-{size}-call.png", size == "wide")
    chat.fill("key", "sk-wrong")
    if size == "narrow":
        chat.close_settings()
    expect(chat.banner()).to_be_visible()
    chat.send("say 一")
    chat.wait()
    expect(chat.banner()).to_be_visible()
    check(page)
    keep(page, shots / f"{ui}-{size}-banner.png", False)


@pytest.mark.parametrize("size", SIZES)
def test_the_training_page_is_in_order(size, training_run, serve_page, new_page, shots):
    page = new_page(*SIZES[size])
    page.goto(serve_page("training", "--output-dir", training_run).address)
    expect(page.locator('[data-testid="stDataFrame"]')).to_be_visible()
    expect(page.locator('[data-testid="stVegaLiteChart"] .marks')).to_have_count(3)
    check(page)
    keep(page, shots / f"training-{size}.png", size == "wide")


def test_a_real_model_answers_in_the_browser(training_run, serve_page, new_page):
    """Tuned, saved, served and asked: the whole way, on a toy."""
    chat = DRIVERS["gradio"](new_page(), serve_page("gradio", "--model", training_run).address).open()
    chat.fill("system", "你是谁")
    chat.send("你是谁")
    expect(chat.status()).to_contain_text(re.compile(r"回答 [1-9]\d* 个 token"))


def test_streamlit_runs_the_page_itself(scripted_api, new_page, tmp_path):
    """As the tutorial does: from any folder, with the page's settings in the environment, and nothing goes outside."""
    page_file = Path(__file__).resolve().parents[2] / "entrypoints" / "web" / "streamlit_page.py"
    port, outside = free_port(), tmp_path / "outside"
    outside.touch()
    running = Process(
        ["-m", "streamlit", "run", page_file, "--server.port", port],
        tmp_path / "log",
        API_URL=f"{scripted_api.url}/v1",
        API_KEY=PAGE_KEY,
        PYTHONPATH=str(SUPPORT / "lonely"),
        OUTSIDE_FILE=str(outside),
    )
    try:
        running.wait_for(f"http://127.0.0.1:{port}/_stcore/health")
        chat = DRIVERS["streamlit"](new_page(), f"http://127.0.0.1:{port}").open()
        chat.ask("say 你好")
    finally:
        running.end()
    assert outside.read_text() == ""
