"""What a run learns and forgets: the probe before and after it, and general rows that are mixed in."""

import json
import re
import shutil

import pytest

from entrypoints.__main__ import main
from entrypoints.errors import UserError
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.preparation import prepare
from entrypoints.training.result.report import write_reports
from entrypoints.training.run_context import open_run


def probe_of(folder):
    return json.loads((folder / "probe.json").read_text())


@pytest.fixture
def general_file(sample_rows, tmp_path):
    """Ten rows that the sample file does not contain."""
    file = tmp_path / "general.jsonl"
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in sample_rows[40:50])
    file.write_text("".join(lines), encoding="utf-8")
    return file


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora", "ptuning"])
def test_the_report_shows_the_loss_of_task_and_general_rows_before_and_after(
    method, tune, toy_native, sample_file, tmp_path
):
    fields = {"method": method, "learning_rate": 1e-2, "max_steps": 12, "save_steps": 12}
    output = tune(tmp_path / "out", **fields)
    found = probe_of(output)
    assert {name: values["rows"] for name, values in found.items()} == {"general": 12, "task": 16}
    assert found["task"]["after"] < found["task"]["before"] - 0.02
    write_reports(TrainArguments(toy_native, sample_file, output, method=method))
    report = (output / "report.md").read_text()
    assert "Probe: what was learned and what was forgotten" in report
    for name, title in (("general", "general questions"), ("task", "rows of the task")):
        values = found[name]
        assert f"| {title} | {values['rows']} | {values['before']:.4f} | {values['after']:.4f} |" in report
    assert f"{found['general']['after']:.4f}" in (output / "report.html").read_text()


@pytest.mark.slow
def test_a_resumed_run_keeps_the_probe_of_its_start(tune, tmp_path):
    whole = tune(tmp_path / "whole")
    output = tmp_path / "out"
    output.mkdir()
    shutil.copytree(whole / "checkpoint-3", output / "checkpoint-3")
    shutil.copy(whole / "probe.json", output / "probe.json")
    tune(output, resume="auto")
    assert probe_of(output) == probe_of(whole)


@pytest.mark.slow
def test_a_run_continued_in_another_folder_takes_the_probe_of_its_start_along(tune, tmp_path):
    whole, other = tune(tmp_path / "whole"), tmp_path / "other"
    other.mkdir()
    (other / "probe.json").write_text('{"general": {"rows": 12, "before": 1.5, "after": null}}')  # of another run
    tune(other, resume=str(whole / "checkpoint-3"))
    assert probe_of(other) == probe_of(whole)
    (whole / "probe.json").unlink()
    tune(other, resume=str(whole / "checkpoint-3"))
    assert {values["before"] for values in probe_of(other).values()} == {None}


@pytest.mark.slow
def test_the_probe_does_not_change_the_run(tune, logged, tmp_path, monkeypatch):
    """Dropout draws the same numbers with and without it."""
    with_probe = tune(tmp_path / "with", method="lora")
    monkeypatch.setattr("entrypoints.training.loop.probe.Probe._measure", lambda probe: {"general": 0.0, "task": 0.0})
    assert logged(tune(tmp_path / "without", method="lora")) == logged(with_probe)


def prepared(toy_native, sample_file, output, **fields):
    return prepare(open_run(TrainArguments(toy_native, sample_file, output, device="cpu", **fields), None))


def test_the_share_of_mixed_rows_is_that_of_all_rows(toy_native, sample_file, general_file, tmp_path):
    plain = prepared(toy_native, sample_file, tmp_path / "plain").dataset
    every = prepared(toy_native, general_file, tmp_path / "general").dataset["input_ids"][:]
    for share, count in ((0.1, 3), (0.2, 6), (0.29, 10)):
        fields = {"mix": f"{general_file}:{share}"}
        mixed = prepared(toy_native, sample_file, tmp_path / f"{share}", **fields).dataset
        assert len(mixed) == len(plain) + count == 24 + count
        assert mixed["input_ids"][:24] == plain["input_ids"][:]
        added = mixed["input_ids"][24:]
        assert all(ids in every for ids in added)
        assert len({tuple(ids) for ids in added}) == count


def test_the_seed_chooses_the_mixed_rows(toy_native, sample_file, general_file, tmp_path):
    fields = {"mix": f"{general_file}:0.15"}
    one, same, other = (
        prepared(toy_native, sample_file, tmp_path / f"{number}", seed=seed, **fields).dataset["input_ids"][24:]
        for number, seed in enumerate((1, 1, 2))
    )
    assert one == same != other


def test_a_share_that_the_file_cannot_fill_is_rejected_with_the_largest_that_fits(
    toy_native, sample_file, general_file, tmp_path
):
    with pytest.raises(UserError, match=r"needs 24 rows, the file has 10; use --mix .*:0\.294") as caught:
        prepared(toy_native, sample_file, tmp_path / "out", mix=f"{general_file}:0.5")
    share = float(re.search(r":(0\.\d+)", caught.value.remedy)[1])
    run = prepared(toy_native, sample_file, tmp_path / "out", mix=f"{general_file}:{share}")
    assert len(run.dataset) == 34


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("general.jsonl", r"--mix general\.jsonl: the share is not a number between 0 and 1, as in FILE:0\.1"),
        ("FILE:1.5", "the share is not a number between 0 and 1"),
        ("FILE:0", "the share is not a number between 0 and 1"),
        ("nowhere.jsonl:0.1", r"file not found: nowhere\.jsonl"),
    ],
)
def test_an_invalid_mix_is_rejected_at_once(value, message, toy_native, sample_file, general_file, tmp_path, capsys):
    words = ["train", "--model-name-or-path", toy_native, "--train-file", sample_file, "--output-dir", tmp_path / "out"]
    assert main([*map(str, words), "--mix", value.replace("FILE", str(general_file))]) == 1
    assert re.search(message, capsys.readouterr().err)
