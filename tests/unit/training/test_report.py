"""report.md and report.html."""

import json
from html.parser import HTMLParser

import pytest

from entrypoints.__main__ import main
from entrypoints.evaluation import metrics
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.result import report


def finished_run(folder, losses):
    """A folder with the Trainer's state of a run that logged these losses."""
    folder.mkdir()
    entries = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 9, "max_steps": 9, "log_history": entries}))


def test_a_long_run_is_reported_in_twenty_rows_with_the_first_and_the_last_loss(toy_native, tmp_path):
    finished_run(tmp_path / "run", [10 - 9 * step / 999 for step in range(1000)])
    report.write_reports(TrainArguments(toy_native, tmp_path / "rows", tmp_path / "run", method="lora"))
    text = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    losses = [line for line in text.partition("## Loss")[2].splitlines() if line.startswith("| ")][2:]
    assert (losses[0], losses[-1], len(losses)) == ("| 1 | 10.0000 |", "| 1000 | 1.0000 |", 20)
    assert "| method | lora |" in text
    assert "| learning rate | 0.0002 |" in text


def test_a_given_learning_rate_is_listed_once(toy_native, tmp_path):
    finished_run(tmp_path / "run", [2.0])
    report.write_reports(TrainArguments(toy_native, tmp_path / "rows", tmp_path / "run", learning_rate=3e-4))
    text = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("| learning")] == ["| learning rate | 0.0003 |"]


def test_answers_before_and_after_are_cells_of_one_row_whatever_they_contain(toy_native, tmp_path):
    finished_run(tmp_path / "run", [2.0])
    arguments = TrainArguments(toy_native, tmp_path / "rows", tmp_path / "run")
    report.write_reports(arguments, [report.Answer("甲|乙", "旧\n行", "新")], [{"bleu_4": 0.5}, {"bleu_4": 1.5}])
    text = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "| 甲\\|乙 | 旧<br>行 | 新 |" in text
    assert "| bleu_4 | 0.5 | 1.5 |" in text


def test_the_page_is_one_file_that_loads_nothing_and_escapes_what_rows_contain(toy_native, tmp_path):
    finished_run(tmp_path / "run", [3.0, 2.0, 1.0])
    arguments = TrainArguments(toy_native, tmp_path / "rows", tmp_path / "run")
    answer = report.Answer("<script>alert(1)</script>", "<img src=http://a>", "&")
    report.write_reports(arguments, [answer], [{"bleu_4": 0.5}, {"bleu_4": 1.5}])
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    read = Page()
    read.feed(page)
    assert read.open == []
    assert set(read.tags) >= {"html", "table"}
    assert not {"script", "img", "link", "iframe"} & set(read.tags)
    assert not {"src", "href"} & read.attributes
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    for step, loss in ((1, "3.0000"), (2, "2.0000"), (3, "1.0000")):
        assert f"<tr><td>{step}</td><td>{loss}</td></tr>" in page


def test_the_text_report_has_no_html_link_or_picture_of_a_row_and_one_line_for_each(toy_native, tmp_path):
    run = tmp_path / "run ![x](http:)<b>"
    finished_run(run, [2.0])
    texts = ("<script>alert(1)</script>", "![a](http://b) [c](javascript:d)", "1\r\n2\r3\u20284\x005|\ud800")
    report.write_reports(
        TrainArguments(toy_native, tmp_path / "rows", run), [report.Answer(*texts)], [{"a\nb": 0.5}, {"a\nb": 1.5}]
    )
    text = (run / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# run !\\[x](http:)&lt;b>\n")
    assert "| &lt;script>alert(1)&lt;/script> | !\\[a](http://b) \\[c](javascript:d) | 1<br>2<br>3<br>45\\|? |" in text
    assert "| a<br>b | 0.5 | 1.5 |" in text
    assert "4\x005|?" in (run / "report.html").read_text(encoding="utf-8")


def test_a_run_that_logged_no_step_has_both_reports(toy_native, tmp_path):
    finished_run(tmp_path / "run", [])
    report.write_reports(TrainArguments(toy_native, tmp_path / "rows", tmp_path / "run"))
    for name in ("report.md", "report.html"):
        assert "nothing was logged" in (tmp_path / "run" / name).read_text(encoding="utf-8")


def test_several_files_are_named_as_on_the_command_line(toy_native, tmp_path):
    finished_run(tmp_path / "run", [2.0])
    files = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    report.write_reports(TrainArguments(toy_native, files, tmp_path / "run"))
    text = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert f"| train_file | {files[0]} {files[1]} |" in text
    assert "Path(" not in text


def test_a_run_with_fewer_steps_than_are_logged_reports_its_mean_loss(toy_native, tmp_path):
    finished_run(tmp_path / "run", [])
    state = {"global_step": 3, "max_steps": 3, "log_history": [{"step": 3, "train_loss": 2.25, "train_runtime": 1.0}]}
    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps(state))
    report.write_reports(TrainArguments(toy_native, tmp_path / "rows", tmp_path / "run"))
    text = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "| 1 to 3, mean | 2.2500 |" in text
    assert "nothing was logged" not in text


class Page(HTMLParser):
    """Tags and attributes of a page; `open`: tags that were not closed."""

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


@pytest.fixture
def flags(toy_native, sample_file, tmp_path):
    """A LoRA run of two steps on the CPU that answers and scores the test rows."""
    files = ["--model-name-or-path", toy_native, "--train-file", sample_file, "--output-dir", tmp_path / "out"]
    scored = ["--test-file", sample_file, "--predict-with-generate", "--max-target-length", 8, "--max-steps", 2]
    return [str(flag) for flag in [*files, *scored, "--method", "lora", "--device", "cpu", "--logging-steps", 1]]


@pytest.mark.slow
def test_a_run_with_scores_reports_answers_before_and_after(flags, tmp_path, capsys):
    """Two rows are scored before the first step."""
    assert main(["train", *flags]) == 0
    err = capsys.readouterr().err
    assert err.index("the answers can be scored") < err.index("step 1: loss")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert text.count("类型#") >= 3
    assert "| 你好 |" in text  # a question of every report
    assert "| question | before | after |" in text
    head, *rows = text.split("## Scores\n\n")[1].split("\n\n")[0].splitlines()
    assert head == "| score | base model | fine-tuned |"
    shown = {name: values for name, *values in (line.strip("| ").split(" | ") for line in rows)}
    for place, folder in enumerate(("out/base-model", "out")):
        scores = json.loads((tmp_path / folder / "predict_results.json").read_text(encoding="utf-8"))
        numbers = {name: f"{value}" for name, value in scores.items() if not isinstance(value, str)}
        assert {name: values[place] for name, values in shown.items() if name in numbers} == numbers
    assert list((tmp_path / "out" / "runs").glob("*/events.out.tfevents.*"))  # TensorBoard without a flag


@pytest.mark.slow
def test_an_evaluation_that_fails_ends_the_run_before_its_first_step(flags, tmp_path, monkeypatch):
    """Not after hours of training."""

    def fail(*_):
        raise KeyError("loss")

    monkeypatch.setattr(metrics, "score", fail)
    with pytest.raises(KeyError, match="loss"):
        main(["train", *flags])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".rows", "run_status.json", "train.log"}
    monkeypatch.undo()
    assert main(["train", *flags]) == 0  # in the same folder
