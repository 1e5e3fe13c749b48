"""report.md and report.html."""

import json
from html.parser import HTMLParser

import pytest

from entrypoints import scoring
from entrypoints.__main__ import main
from entrypoints.training import report
from entrypoints.training.arguments import TrainArguments


def history(folder, losses):
    folder.mkdir()
    entries = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries}))


def test_the_curve_falls_where_the_loss_does_and_long_runs_stay_short(toy_native, tmp_path):
    history(tmp_path / "run", [10 - 9 * step / 999 for step in range(1000)])
    report.write(TrainArguments(toy_native, tmp_path / "rows", tmp_path / "run", method="lora"))
    text = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    curve = text.split("`")[1]
    assert (curve[0], curve[-1], len(curve)) == ("█", "▁", 60)
    assert "10.000 to 1.000" in text
    assert len([line for line in text.splitlines() if line.startswith("| ")]) <= 40
    assert "| method | lora |" in text and "| learning rate | 0.0002 |" in text


def test_answers_stand_side_by_side_whatever_they_hold(toy_native, tmp_path):
    history(tmp_path / "run", [2.0])
    told = TrainArguments(toy_native, tmp_path / "rows", tmp_path / "run")
    report.write(told, ["甲|乙"], ["旧\n行"], ["新"], {"bleu_4": 1.5})
    text = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "| 甲\\|乙 | 旧<br>行 | 新 |" in text
    assert "| bleu_4 | 1.5 |" in text


def test_the_page_is_one_file_that_asks_nothing_of_another_place(toy_native, tmp_path):
    """The curve is drawn in it, and what rows and answers hold is text."""
    history(tmp_path / "run", [3.0, 2.0, 1.0])
    told = TrainArguments(toy_native, tmp_path / "rows", tmp_path / "run")
    report.write(told, ["<script>alert(1)</script>"], ["<img src=http://a>"], ["&"], {"bleu_4": 1.5})
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    read = Page()
    read.feed(page)
    assert read.open == []
    assert set(read.tags) >= {"html", "svg", "polyline", "table"}
    assert not {"script", "img", "link", "iframe"} & set(read.tags)
    assert not {"src", "href"} & read.attributes
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    heights = [float(point.split(",")[1]) for point in page.split('points="')[1].split('"')[0].split()]
    assert heights == sorted(heights) and len(heights) == 3  # downwards, as the loss


def test_a_run_without_a_logged_step_has_a_page_too(toy_native, tmp_path):
    history(tmp_path / "run", [])
    report.write(TrainArguments(toy_native, tmp_path / "rows", tmp_path / "run"))
    assert "nothing was logged" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "<svg" not in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tags and attributes of a page; `open` are tags that were not closed."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.open = [], set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_run_with_scores_reports_answers_before_and_after(toy_native, sample_file, tmp_path, capsys):
    """G13: the two rows are scored before the first step."""
    words = ["--model-name-or-path", toy_native, "--train-file", sample_file, "--output-dir", tmp_path / "out"]
    words += ["--test-file", sample_file, "--predict-with-generate", "--max-target-length", 8, "--max-steps", 2]
    words += ["--method", "lora", "--device", "cpu", "--logging-steps", 1]
    assert main([str(word) for word in ["train", *words]]) == 0
    err = capsys.readouterr().err
    assert err.index("its answers are scored") < err.index("step 1: loss")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert text.count("类型#") >= 3
    assert "| 你好 |" in text  # asked in every run
    assert "| question | before | after |" in text and "| rouge_l |" in text
    assert list((tmp_path / "out" / "runs").glob("*/events.out.tfevents.*"))  # TensorBoard, nothing to be said


def test_an_evaluation_that_breaks_ends_the_run_before_its_first_step(toy_native, sample_file, tmp_path, monkeypatch):
    """G13: not after hours. What breaks in a release is not known before, so the scores break here."""

    def breaks(*_):
        raise KeyError("loss")

    monkeypatch.setattr(scoring, "score", breaks)
    words = ["--model-name-or-path", toy_native, "--train-file", sample_file, "--output-dir", tmp_path / "out"]
    words += ["--test-file", sample_file, "--predict-with-generate", "--max-target-length", 8, "--device", "cpu"]
    with pytest.raises(KeyError, match="loss"):
        main([str(word) for word in ["train", *words]])
    assert not (tmp_path / "out").exists()
