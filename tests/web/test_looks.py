"""Layout of the pages on wide and narrow screens, with screenshots in tests/web/screenshots.

The pictures of the READMEs are created here too: GLM_PICTURES=1 renews tests/web/pictures.
"""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from chat_drivers import DRIVERS
from PIL import Image
from playwright.sync_api import Locator, Page, expect
from processes import PAGE_KEY, SUPPORT, Process, free_port, glm
from scripted_engine import wait_until

from entrypoints.training.arguments import TrainArguments
from entrypoints.training.result import report

pytestmark = pytest.mark.slow

SIZES = {"wide": (1400, 900), "narrow": (320, 640)}
PICTURE_SIZE = {"width": 1400, "height": 1000}  # shows the whole conversation
PICTURES = Path(__file__).parent / "pictures"
# Controls and titles must not overlap and must be within the width of the screen.
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
    if (p.right > innerWidth + 1 || p.left < -1) found.push(`${name(a)} is outside the screen`);
    for (const b of seen.slice(i + 1)) {
      if (a.contains(b) || b.contains(a)) continue;
      const q = b.getBoundingClientRect();
      const width = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const height = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      const field = a.closest("label, [data-baseweb], .stTextInput, .stChatInput, #question, .wrap");
      if (width > 2 && height > 2 && !(field && field.contains(b))) found.push(`${name(a)} overlaps ${name(b)}`);
    }
  }
  return found;
}"""
# Characters that are missing in all fonts are drawn as the same box.
HAS_CHINESE_FONT = """() => {
  const draw = (character) => {
    const canvas = document.createElement("canvas");
    const context = canvas.getContext("2d");
    context.font = `32px ${getComputedStyle(document.body).fontFamily}`;
    context.fillText(character, 4, 36);
    return canvas.toDataURL();
  };
  return new Set(["你", "好", "鱻", "\\u{10FFFF}"].map(draw)).size === 4;
}"""


def check_layout(page: Page) -> None:
    """Wait until nothing overlaps and nothing is wider than the screen; assert that Chinese has a font."""
    eventually(lambda: page.evaluate("document.documentElement.scrollWidth <= innerWidth"))
    eventually(lambda: page.evaluate(COLLISIONS) == [], lambda: page.evaluate(COLLISIONS))
    assert page.evaluate(HAS_CHINESE_FONT)


def eventually(condition: Callable[[], bool], problem: Callable[[], object] = lambda: "") -> None:
    """Wait until the condition holds; raises AssertionError with the problem."""
    try:
        wait_until(condition, 20)
    except AssertionError as error:
        raise AssertionError(problem()) from error


def bottom_of(element: Locator) -> float:
    """Lower edge, in pixels from the top of the screen."""
    box = element.bounding_box()
    return box["y"] + box["height"]


def take_screenshot(page: Page, file: Path, is_picture: bool = False) -> None:
    """Save a screenshot; with GLM_PICTURES also as a picture of the READMEs."""
    page.screenshot(path=file)
    if is_picture and os.environ.get("GLM_PICTURES"):
        page.set_viewport_size(PICTURE_SIZE)
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)  # for the layout to settle
        page.screenshot(path=file)
        Image.open(file).convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(
            PICTURES / file.name, optimize=True
        )


@pytest.mark.parametrize("size", SIZES)
def test_the_layout_of_a_chat_page_is_correct(size, ui, visit, screenshots):
    chat = visit(width=SIZES[size][0], height=SIZES[size][1])
    page = chat.page
    check_layout(page)
    take_screenshot(page, screenshots / f"{ui}-{size}-empty.png")
    chat.ask("你好", re.compile("部署在本机"))
    chat.ask("用 Python 写一个求平方和的函数，并给出公式", re.compile("squares"))
    expect(chat.bubbles("assistant").last.locator("pre code")).to_contain_text("squares")
    check_layout(page)
    eventually(lambda: bottom_of(chat.input()) <= SIZES[size][1], lambda: "the input field is outside the screen")
    eventually(
        lambda: 0 < bottom_of(chat.bubbles("assistant").last) <= chat.input().bounding_box()["y"],
        lambda: "the page does not scroll along with the answer",
    )
    take_screenshot(page, screenshots / f"{ui}-{size}-talk.png", size == "wide")
    chat.setting("system")
    check_layout(page)
    take_screenshot(page, screenshots / f"{ui}-{size}-settings.png")


@pytest.mark.parametrize("size", SIZES)
def test_the_layout_of_a_tool_call_and_a_banner_is_correct(size, ui, visit, screenshots):
    chat = visit(width=SIZES[size][0], height=SIZES[size][1], locale="en-US")
    page = chat.page
    chat.enable_tools()
    check_layout(page)
    take_screenshot(page, screenshots / f"{ui}-{size}-tools.png")
    if size == "narrow":
        chat.close_sidebar()
    chat.submit("北京今天天气怎么样？")
    expect(chat.bubbles("assistant").last).to_contain_text("get_weather")
    chat.wait_for_answer()
    chat.ask("晴，31度", "工具说：晴，31度")
    check_layout(page)
    take_screenshot(page, screenshots / f"{ui}-{size}-call.png", size == "wide")
    chat.fill_setting("key", "sk-wrong")
    if size == "narrow":
        chat.close_sidebar()
    expect(chat.banner()).to_be_visible()
    chat.send("say 一")
    chat.wait_for_answer()
    expect(chat.banner()).to_be_visible()
    check_layout(page)
    take_screenshot(page, screenshots / f"{ui}-{size}-banner.png")


@pytest.mark.parametrize("size", SIZES)
def test_the_layout_of_the_training_page_is_correct(size, training_run, training_address, new_page, screenshots):
    page = new_page(*SIZES[size])
    page.goto(training_address)
    expect(page.locator('[data-testid="stDataFrame"]').first).to_be_visible()
    expect(page.locator('[data-testid="stVegaLiteChart"] .marks')).to_have_count(5)
    check_layout(page)
    shown = page.get_by_text(str(training_run), exact=True).last
    shown.evaluate("(e, folder) => e.textContent = e.textContent.replace(folder, 'output/demo')", str(training_run))
    take_screenshot(page, screenshots / f"training-{size}.png", size == "wide")


def test_names_in_the_report_of_a_run_are_not_broken_beside_a_long_value(new_page, tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"log_history": [], "global_step": 0, "max_steps": 0}')
    answer = report.Answer("问" * 50, "前" * 500, "")
    scores = {"n": 1, "n_empty_predictions": 0, "definition": "percent " * 50}
    report.write_reports(TrainArguments(Path("base"), Path("rows"), tmp_path), [answer], [scores, scores])
    page = new_page()
    page.set_content((tmp_path / "report.html").read_text(encoding="utf-8"))
    lines = {
        name: page.get_by_text(name, exact=True).evaluate(
            "e => Math.round(getComputedStyle(e).height.slice(0, -2) / 24)"
        )
        for name in ("n_empty_predictions", "after")
    }
    assert lines == {"n_empty_predictions": 1, "after": 1}


def test_a_fine_tuned_model_answers_in_the_browser(training_run, new_page, tmp_path):
    """The whole path with one command: the page starts a server for the model, and Ctrl-C stops both."""
    port = free_port()
    running = Process(glm("web", "--model", training_run, "--port", port), tmp_path / "log")
    try:
        running.wait_for(f"http://127.0.0.1:{port}/healthz")
        (server,) = psutil.Process(running.popen.pid).children()
        chat = DRIVERS["gradio"](new_page(), f"http://127.0.0.1:{port}").open()
        chat.fill_setting("system", "你是谁")
        chat.send("你是谁")
        expect(chat.status()).to_contain_text(re.compile(r"回答 [1-9]\d* 个 token"))
        assert running.end(signal.SIGINT) == 0
        wait_until(lambda: not server.is_running())
    finally:
        running.end()


def test_streamlit_run_serves_the_page_without_contacting_other_hosts(scripted_api, new_page, tmp_path):
    """Without `glm web`: from any folder, with the settings in the environment."""
    page_file = Path(__file__).resolve().parents[2] / "entrypoints" / "web" / "streamlit_page.py"
    port, outside = free_port(), tmp_path / "outside"
    outside.touch()
    running = Process(
        ["-m", "streamlit", "run", page_file, "--server.port", port],
        tmp_path / "log",
        API_URL=f"{scripted_api.url}/v1",
        API_KEY=PAGE_KEY,
        PYTHONPATH=str(SUPPORT / "network_recorder"),
        OUTSIDE_FILE=str(outside),
    )
    try:
        running.wait_for(f"http://127.0.0.1:{port}/_stcore/health")
        chat = DRIVERS["streamlit"](new_page(), f"http://127.0.0.1:{port}").open()
        chat.ask("say 你好")
    finally:
        running.end()
    assert outside.read_text() == ""
