"""The training page, in front of the records of a real run and of one that is under way."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watched") / "run"


@pytest.fixture(scope="module")
def address(folder: Path, serve_page: Callable) -> str:
    return serve_page("training", "--output-dir", folder).address


def metric(page: Page, label: str) -> Locator:
    return page.locator('[data-testid="stMetric"]', has_text=label).locator('[data-testid="stMetricValue"]')


def test_a_run_is_followed_from_its_first_record_to_its_scores(folder, address, training_run, new_page):
    page = new_page()
    page.goto(address)
    expect(page.get_by_text("还没有训练记录")).to_be_visible()
    folder.mkdir(parents=True)
    shutil.copytree(training_run / "checkpoint-10", folder / "checkpoint-10")
    expect(page.get_by_text("第 10 / 20 步")).to_be_visible()  # without a reload
    expect(metric(page, "剩余时间")).to_have_text("未知")  # one time alone makes no pace
    for file in training_run.glob("*.json*"):
        shutil.copy(file, folder)
    expect(page.get_by_text("第 20 / 20 步")).to_be_visible()
    expect(metric(page, "剩余时间")).to_have_text("已完成")
    scores = json.loads((training_run / "predict_results.json").read_text())
    expect(metric(page, "bleu_4")).to_have_text(f"{scores['bleu_4']:.4g}")
    for title in ("训练损失", "学习率", "梯度范数"):
        expect(page.locator('[data-testid="stVegaLiteChart"]').first).to_be_visible()
        expect(page.get_by_text(title, exact=True).first).to_be_visible()
    expect(page.locator('[data-testid="stDataFrame"]')).to_be_visible()


def test_a_half_written_record_does_not_break_the_page(folder, address, training_run, new_page):
    folder.mkdir(parents=True, exist_ok=True)
    for file in training_run.glob("*.json*"):
        shutil.copy(file, folder)
    text = (training_run / "trainer_state.json").read_text()
    (folder / "trainer_state.json").write_text(text[: len(text) // 2])
    with (folder / "generated_predictions.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"prompt": "ha')
    page = new_page(locale="en-US")
    page.goto(address)
    expect(page.locator('[data-testid="stDataFrame"]')).to_be_visible()
    expect(page.get_by_text("Sample predictions")).to_be_visible()
    expect(page.locator('[data-testid="stException"]')).to_have_count(0)


def test_the_page_changes_nothing(folder, address, training_run, new_page):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}
    page = new_page()
    page.goto(address)
    expect(page.get_by_text("训练进度")).to_be_visible()
    page.wait_for_timeout(1000)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")} == before
