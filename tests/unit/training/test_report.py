"""report.md."""

import json

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
    assert "| question | before | after |" in text and "| rouge_l |" in text
    assert list((tmp_path / "out" / "runs").glob("*/events.out.tfevents.*"))  # TensorBoard, nothing to be said
