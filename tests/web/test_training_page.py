"""The training page, with the files of a run in progress and of a finished run, and with several runs."""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect
from scripted_engine import wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watched") / "run"


@pytest.fixture(scope="module")
def address(folder: Path, serve_page: Callable) -> str:
    return serve_page("training", "--output-dir", folder).address


def metric(page: Page, label: str) -> Locator:
    return page.locator('[data-testid="stMetric"]', has_text=label).locator('[data-testid="stMetricValue"]')


def cells(page: Page, alt: str) -> list[list[str]]:
    """The rows of a table. It is drawn on a canvas, which holds the texts for screen readers."""
    table = page.locator(f'[data-testid="stDataFrame"]:has(button[aria-label$=": {alt}"])')
    rows = table.locator("canvas tbody tr")
    expect(rows.first).to_be_attached()
    return [row.locator("td").all_text_contents() for row in rows.all()]


def json_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def beat(folder: Path, **fields: object) -> None:
    """The status file of a run in progress."""
    now = time.time()
    status = {"state": "running", "phase": "training", "started": now - 60, "heartbeat": now, "first_step": 0, **fields}
    (folder / "run_status.json").write_text(json.dumps(status))


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_a_run_is_followed_from_its_first_log_record_to_its_scores(folder, address, training_run, new_page):
    log = (training_run / "training_log.jsonl").read_text().splitlines(keepends=True)
    total = json.loads((training_run / "trainer_state.json").read_text())["max_steps"]
    half = total // 2
    page = new_page()
    page.goto(address)
    expect(page.get_by_text("暂无训练记录")).to_be_visible()
    folder.mkdir(parents=True)
    (folder / "training_log.jsonl").write_text(next(line for line in log if json.loads(line)["step"] == 2))
    beat(folder, total_steps=None)
    expect(page.get_by_text("第 2 / ? 步")).to_be_visible()  # without a reload
    expect(metric(page, "剩余时间")).to_have_text("未知")  # one record gives no pace
    (folder / "training_log.jsonl").write_text("".join(line for line in log if json.loads(line)["step"] <= half))
    shutil.copytree(training_run / f"checkpoint-{half}", folder / f"checkpoint-{half}")
    expect(page.get_by_text(f"第 {half} / {total} 步")).to_be_visible()
    expect(metric(page, "剩余时间")).to_have_text(re.compile(r"\d:\d\d:\d\d"))
    for file in training_run.glob("*.json*"):
        shutil.copy(file, folder)
    expect(page.get_by_text(f"第 {total} / {total} 步")).to_be_visible()
    expect(metric(page, "剩余时间")).to_have_text("已完成")
    scores = json.loads((training_run / "predict_results.json").read_text())
    assert dict(cells(page, "评测指标"))["bleu_4"] == f"{scores['bleu_4']:.4g}"
    for title in ("损失", "学习率", "梯度范数"):
        expect(page.locator('[data-testid="stVegaLiteChart"]').first).to_be_visible()
        expect(page.get_by_text(title, exact=True).first).to_be_visible()
    assert cells(page, "预测示例")[0][0] == json_lines(training_run / "generated_predictions.jsonl")[0]["prompt"]


def test_half_written_files_do_not_break_the_page_and_the_page_changes_nothing(folder, address, training_run, new_page):
    folder.mkdir(parents=True, exist_ok=True)
    for file in training_run.glob("*.json*"):
        shutil.copy(file, folder)
    state = (training_run / "trainer_state.json").read_text()
    (folder / "trainer_state.json").write_text(state[: len(state) // 2])
    for name, fragment in (("generated_predictions.jsonl", '{"prompt": "ha'), ("training_log.jsonl", '{"step": 2')):
        with (folder / name).open("a", encoding="utf-8") as stream:
            stream.write(fragment)
    before = snapshot(folder)
    page = new_page(locale="en-US")
    page.goto(address)
    expect(page.get_by_text("Training progress")).to_be_visible()
    expect(page.get_by_text(re.compile(r"Step \d+ of \d+"))).to_be_visible()
    expect(page.locator('[data-testid="stDataFrame"]').first).to_be_visible()
    expect(page.get_by_text("Sample predictions")).to_be_visible()
    expect(page.locator('[data-testid="stException"]')).to_have_count(0)
    assert snapshot(folder) == before


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a running, a killed, a failed and a finished run, the running one being the newest."""
    root = tmp_path_factory.mktemp("several")
    ends = {"finished": 0, "failed": 0, "killed": 0, "running": 0}
    for number, name in enumerate(ends):
        folder = root / "ads" / name
        folder.mkdir(parents=True)
        events = [
            {"step": step, "epoch": step / 10, "time": time.time() - 90 + step, "loss": 3 - step / (20 + number),
             "learning_rate": 1e-4, "grad_norm": 1.0, "tokens_per_second": 900.0, "memory_gib": 11.5,
             **({"eval_loss": 2 + abs(step - 20) / 10} if step % 10 == 0 else {})}
            for step in range(5, 35, 5)
        ]  # fmt: skip
        (folder / "training_log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        (folder / "train.log").write_text(f"INFO first line\nINFO the last line of {name}\n")
        beat(
            folder,
            state="running" if name == "killed" else name,
            heartbeat=time.time() - (600 if name == "killed" else 0),
            total_steps=60,
            message="out of memory on **one** GPU" if name == "failed" else "",
            settings={"method": "lora", "learning_rate": (number + 1) / 1000, "output_dir": name},
        )
        for step in (10, 20, 30):
            row = {"step": step, "prompt": "a*b*c", "reference": "r", "prediction": f"{name} at {step}"}
            with (folder / "evaluation_samples.jsonl").open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            write_checkpoint(folder / f"checkpoint-{step}", step, 2 + abs(step - 20) / 10)
    (root / "ads" / "finished" / "predict_results.json").write_text('{"**bleu** :red[4] $x$": 8.01}')
    return root


def write_checkpoint(folder: Path, step: int, eval_loss: float) -> None:
    folder.mkdir()
    (folder / "optimizer.pt").write_bytes(b"")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 60}))
    record = {"made_with": {}, "files": {"optimizer.pt": 0}, "step": step, "sequence": step, "eval_loss": eval_loss}
    (folder / "checkpoint.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def several_address(several: Path, serve_page: Callable) -> str:
    return serve_page("training", "--output-dir", several).address


@pytest.fixture
def page(several: Path, several_address: str, new_page: Callable) -> Page:
    """The page with several runs, in English."""
    beat(several / "ads" / "running", total_steps=60, settings={"method": "lora", "learning_rate": 4e-4})
    page = new_page(locale="en-US")
    page.goto(several_address)
    expect(page.get_by_text("Step 30 of 60")).to_be_visible()
    return page


def choose(page: Page, *names: str) -> None:
    """Choose exactly these runs."""
    box = page.locator('[data-testid="stMultiSelect"]')
    box.get_by_role("button", name="Clear all").click()
    for name in names:
        box.locator("input").click()
        page.get_by_role("option", name=name).click()
    page.keyboard.press("Escape")


def test_running_killed_failed_and_finished_runs_have_different_states(page):
    badge = page.locator('[data-testid="stMarkdownBadge"], .stMarkdownBadge')
    expect(badge).to_have_text("Running")
    expect(metric(page, "Remaining")).to_have_text("0:00:30")  # one second for each of 30 steps
    choose(page, "ads/killed")
    expect(badge).to_have_text("Stopped")
    expect(page.get_by_text("The run has given no sign of life since")).to_be_visible()
    expect(metric(page, "Remaining")).to_have_text("–")
    expect(page.get_by_text("the last line of killed")).to_be_visible()
    choose(page, "ads/failed")
    expect(badge).to_have_text("Failed")
    expect(page.get_by_text("out of memory on **one** GPU")).to_be_visible()
    choose(page, "ads/finished")
    expect(badge).to_have_text("Finished")
    expect(metric(page, "Remaining")).to_have_text("Finished")
    assert cells(page, "Evaluation metrics") == [["**bleu** :red[4] $x$", "8.01"]]  # as typed


def test_a_run_shows_its_speed_memory_settings_log_and_best_checkpoint(page):
    expect(metric(page, "Tokens per second")).to_have_text("900")
    expect(metric(page, "Peak memory (GiB)")).to_have_text("11.5")
    assert [[row[0], row[-1]] for row in cells(page, "Checkpoints")] == [
        ["checkpoint-30", ""], ["checkpoint-20", "★"], ["checkpoint-10", ""],
    ]  # fmt: skip
    page.get_by_text("Settings", exact=True).click()
    assert ["method", "lora"] in cells(page, "Settings")
    page.get_by_text("End of the log").click()
    expect(page.get_by_text("the last line of running")).to_be_visible()


def test_answers_at_an_earlier_evaluation_can_be_chosen(page):
    assert cells(page, "Answers at each evaluation") == [["a*b*c", "r", "running at 30"]]
    page.get_by_role("slider").focus()
    page.keyboard.press("ArrowLeft")
    table = page.locator('[data-testid="stDataFrame"]:has(button[aria-label$=": Answers at each evaluation"])')
    expect(table.locator("canvas td").last).to_have_text("running at 20")


def test_several_runs_are_compared_by_curves_settings_scores_and_answers(page):
    choose(page, "ads/finished", "ads/killed")
    expect(page.get_by_text("Settings that differ")).to_be_visible()
    expect(page.locator('[data-testid="stVegaLiteChart"]')).to_have_count(6)
    wait_until(lambda: len(cells(page, "Runs")) == 2, 20)
    assert sorted(row[:3] for row in cells(page, "Runs")) == [
        ["ads/finished", "Finished", "30 / 60"], ["ads/killed", "Stopped", "30 / 60"],
    ]  # fmt: skip
    assert {row[5] for row in cells(page, "Runs")} == {"checkpoint-20"}
    (rates,) = cells(page, "Settings that differ")
    assert (rates[0], set(rates[1:])) == ("learning_rate", {"0.001", "0.003"})
    (score,) = cells(page, "Evaluation metrics")
    assert (score[0], set(score[1:])) == ("**bleu** :red[4] $x$", {"–", "8.01"})
    (answers,) = cells(page, "Answers at each evaluation")
    assert (answers[:2], set(answers[2:])) == (["a*b*c", "r"], {"killed at 30", "finished at 30"})


@pytest.mark.parametrize(("width", "per_row"), [(1400, 3), (900, 2), (390, 1)])
def test_charts_fill_the_width_of_the_page(width, per_row, several_address, new_page):
    page = new_page(width, 900)
    page.goto(several_address)
    charts = page.locator(".st-key-charts > *")
    expect(charts).to_have_count(5)

    def first_row() -> list[float]:
        boxes = [chart.bounding_box() for chart in charts.all()]
        return [box["width"] for box in boxes if box["y"] == boxes[0]["y"]]

    def is_full() -> bool:
        widths = first_row()
        return len(widths) == per_row and sum(widths) > 0.8 * width

    wait_until(is_full, 20)  # the style of the page arrives after its parts
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_wrong_type_in_a_file_is_named_and_the_page_stays(several, several_address, new_page):
    (several / "ads" / "running" / "trainer_state.json").write_text('{"global_step": [1], "max_steps": "many"}')
    page = new_page(locale="en-US")
    page.goto(several_address)
    expect(page.get_by_text("These fields have a wrong type and are ignored:")).to_be_visible()
    expect(page.get_by_text("trainer_state.json: max_steps")).to_be_visible()
    expect(page.locator('[data-testid="stException"]')).to_have_count(0)
    (several / "ads" / "running" / "trainer_state.json").unlink()
