"""The training page: the states of runs, runs that are found below a folder and compared, whatever their files hold."""

import itertools
import json
import os
from pathlib import Path

import pytest

from entrypoints.training.checkpoints.run_status import STALE_SECONDS
from entrypoints.web.training_runs.charts import MAX_POINTS, chart, thin_out
from entrypoints.web.training_runs.comparison import answers_at, different_settings, evaluation_steps, scores_by_name
from entrypoints.web.training_runs.discovery import MAX_DEPTH, find_runs
from entrypoints.web.training_runs.status import TrainingStatus, read_training_status

NOW = 100_000.0


def write_run(folder: Path, *events: dict, **fields: object) -> Path:
    """A run that started 100 seconds ago, and its log."""
    folder.mkdir(parents=True, exist_ok=True)
    status = {
        "state": "running", "phase": "training", "started": NOW - 100, "heartbeat": NOW - 5, "first_step": 0,
        "total_steps": 60, **fields,
    }  # fmt: skip
    (folder / "run_status.json").write_text(json.dumps(status))
    write_log(folder, *events)
    return folder


def write_log(folder: Path, *events: dict) -> None:
    (folder / "training_log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def losses(*steps: int, start: float = NOW - 50) -> list[dict]:
    return [{"step": step, "time": start + step, "loss": 3.0 - step / 100} for step in steps]


def test_a_running_run_shows_the_time_that_is_left(tmp_path):
    status = read_training_status(write_run(tmp_path, *losses(10, 20)), now=NOW)
    assert (status.state, status.step, status.total_steps) == ("running", 20, 60)
    assert (status.elapsed_seconds, status.remaining_seconds) == (95.0, 40.0)


def test_a_killed_run_shows_as_stopped_without_a_time_left(tmp_path):
    """Nothing could write that it ended; its heartbeat is old."""
    write_run(tmp_path, *losses(10, 20), heartbeat=NOW - STALE_SECONDS - 1)
    status = read_training_status(tmp_path, now=NOW)
    assert (status.state, status.is_silent, status.remaining_seconds) == ("stopped", True, None)
    assert status.last_sign == NOW - STALE_SECONDS - 1


@pytest.mark.parametrize("state", ["stopped", "failed", "finished"])
def test_a_run_that_says_how_it_ended_is_believed(state, tmp_path):
    write_run(tmp_path, *losses(10, 20), state=state, message="reason", heartbeat=NOW - 9999)
    status = read_training_status(tmp_path, now=NOW)
    assert (status.state, status.is_silent, status.message, status.remaining_seconds) == (state, False, "reason", None)


def test_the_result_of_an_earlier_run_does_not_finish_a_running_one(tmp_path):
    (tmp_path / "train_results.json").write_text('{"train_runtime": 12.5}')
    assert read_training_status(write_run(tmp_path, *losses(10, 20)), now=NOW).state == "running"


def test_a_run_without_a_status_file_is_judged_by_its_log(tmp_path):
    write_log(tmp_path, *losses(10, 20, 30, start=NOW - 30))
    assert read_training_status(tmp_path, now=NOW + 90).state == "running"  # ten intervals are 100 seconds
    assert read_training_status(tmp_path, now=NOW + 101).state == "stopped"


def test_a_folder_that_is_trained_again_shows_the_new_run_only(tmp_path):
    """The log of the run before was appended to by another program: step 1616 of 60, and a rate in zigzag."""
    write_run(tmp_path, *losses(5, *range(10, 1620, 10), 1616, start=0), *losses(5, 10, 20))
    status = read_training_status(tmp_path, now=NOW)
    assert (status.step, status.total_steps) == (20, 60)
    assert list(status.curves["loss"]) == [5, 10, 20]
    assert status.remaining_seconds == 40.0


def test_before_its_first_step_a_fresh_run_shows_nothing_of_the_run_before(tmp_path):
    write_run(tmp_path, *losses(10, 1616), phase="preparing", settings={"method": "lora"})
    (tmp_path / "predict_results.json").write_text('{"bleu_4": 1.0}')
    status = read_training_status(tmp_path, now=NOW)
    assert (status.state, status.phase, status.step, status.total_steps) == ("running", "preparing", 0, 60)
    assert (status.curves, status.scores, status.settings) == ({}, {}, {"method": "lora"})
    write_run(tmp_path, *losses(10, 20), phase="preparing", first_step=20)  # a continued one keeps its log
    assert read_training_status(tmp_path, now=NOW).step == 20


def test_going_back_to_a_checkpoint_replaces_what_was_logged_after_it(tmp_path):
    write_run(tmp_path, *losses(10, 20, 30), {"step": 30, "eval_loss": 2.0}, {"step": 20, "loss": 1.5})
    status = read_training_status(tmp_path, now=NOW)
    assert status.curves == {"loss": {10: 2.9, 20: 1.5}}


VALUES = [None, True, "x", "\ud800", [], {}, [1], 1.5, -1, 1e400, float("nan"), 10**400]


@pytest.mark.parametrize("name", ["global_step", "max_steps", "epoch"])
def test_a_wrong_type_in_the_state_is_reported_by_file_and_field_and_never_raises(name, tmp_path):
    reported = []
    for value in VALUES:
        (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 3, "max_steps": 5, name: value}))
        write_log(tmp_path, *losses(1, 2))
        status = read_training_status(tmp_path, now=NOW)
        assert status.step == 2
        if status.problems:
            assert status.problems == [("trainer_state.json", name)]
            reported.append(value)
    assert len(reported) == len(VALUES) - (2 + 1)  # null, NaN and 1.5 are not of a wrong type


@pytest.mark.parametrize(
    "file", ["run_status.json", "trainer_state.json", "train_results.json", "predict_results.json"]
)
def test_any_value_in_any_field_of_any_file_leaves_a_status(file, tmp_path):
    fields = ("state", "phase", "message", "heartbeat", "first_step", "total_steps", "settings", "global_step", "epoch",
              "train_runtime", "bleu_4")  # fmt: skip
    for field, value in itertools.product(fields, VALUES):
        write_run(tmp_path, *losses(1, 2), settings={"a": "\ud800"})
        (tmp_path / file).write_text(json.dumps({"state": "running", "bleu_4": 3.0, field: value}))
        status = read_training_status(tmp_path, now=NOW)
        assert status.step == 2
        repr(status).encode()  # what a page sends has no lone surrogates


def test_lone_surrogates_of_samples_and_names_can_be_shown(tmp_path):
    (tmp_path / "predict_results.json").write_text('{"a\\ud800": 1.0}')
    row = '{"step": 3, "prompt": "\\ud800", "reference": [1], "prediction": {"a": "\\udfff"}}\n'
    for name in ("generated_predictions.jsonl", "evaluation_samples.jsonl"):
        (tmp_path / name).write_text(row)
    status = read_training_status(tmp_path)
    assert status.scores == {"a?": 1.0}
    assert status.samples == status.evaluations[3] == [{"prompt": "?", "reference": "1", "prediction": '{"a": "?"}'}]


def test_the_answers_of_each_evaluation_are_kept_by_step(tmp_path):
    rows = [
        {"step": step, "prompt": f"q{n}", "reference": "r", "prediction": f"{step}"} for step in (5, 9) for n in (1, 2)
    ]
    again = {"step": 7, "prompt": "q1", "reference": "r", "prediction": "after going back"}
    file = tmp_path / "evaluation_samples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_log(tmp_path, *losses(1))
    assert {step: len(found) for step, found in read_training_status(tmp_path).evaluations.items()} == {5: 2, 9: 2}
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, again]))
    assert list(read_training_status(tmp_path).evaluations) == [5, 7]


def test_runs_below_a_folder_are_found_newest_first(tmp_path):
    for number, name in enumerate(["a", "b/c", "b/checkpoint-3", ".hidden", "x/y/z", "x/y/z/too-deep"]):
        write_run(tmp_path / name)
        for file in (tmp_path / name).iterdir():
            os.utime(file, (number, 1000 + number))
    (tmp_path / "a" / "base-model").mkdir()
    (tmp_path / "a" / "base-model" / "predict_results.json").write_text('{"bleu_4": 1.0}')
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    assert MAX_DEPTH == 3
    assert [run.name for run in find_runs(tmp_path)] == ["x/y/z", "b/c", "a"]
    assert [run.folder for run in find_runs(tmp_path / "a")] == [tmp_path / "a"]
    assert find_runs(tmp_path / "no") == []


def test_only_settings_that_differ_are_compared():
    runs = {
        "a": TrainingStatus(settings={"method": "lora", "learning_rate": "0.1", "output_dir": "a", "new": "1"}),
        "b": TrainingStatus(settings={"method": "lora", "learning_rate": "0.2", "output_dir": "b"}),
    }
    assert different_settings(runs) == {"learning_rate": {"a": "0.1", "b": "0.2"}, "new": {"a": "1", "b": ""}}


def test_scores_and_answers_of_runs_are_side_by_side():
    sample = {"prompt": "q", "reference": "r"}
    runs = {
        "a": TrainingStatus(scores={"bleu_4": 1.0}, evaluations={5: [{**sample, "prediction": "x"}]}),
        "b": TrainingStatus(scores={"rouge_l": 2.0}, evaluations={5: [{**sample, "prediction": "y"}], 6: []}),
    }
    assert scores_by_name(runs) == {"bleu_4": {"a": 1.0, "b": None}, "rouge_l": {"a": None, "b": 2.0}}
    assert evaluation_steps(runs) == [5, 6]
    assert answers_at(runs, 5) == [{**sample, "a": "x", "b": "y"}]


def test_a_long_curve_keeps_its_peaks():
    curve = dict.fromkeys(range(100000), 1.0) | {31_415: 9.0, 27_182: -9.0}
    points = thin_out(curve)
    assert len(points) <= MAX_POINTS
    assert {(31_415, 9.0), (27_182, -9.0)} <= set(points)
    assert thin_out({3: 1.0, 1: 2.0}) == [(1, 2.0), (3, 1.0)]


def test_the_best_checkpoint_is_a_point_of_its_own_in_the_chart():
    layers = chart({"Validation loss": {5: 2.0, 10: 1.0, 15: 1.5}}, {"Validation loss": 10}, "step")["layer"]
    assert [len(layer["data"]["values"]) for layer in layers] == [3, 1]
    assert layers[1]["data"]["values"] == [{"name": "Validation loss", "step": 10, "value": 1.0}]
    assert layers[1]["mark"]["shape"] == "diamond"
