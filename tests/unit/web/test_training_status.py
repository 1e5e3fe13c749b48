"""What the training page reads from the output directory of a run."""

import json
import os
from pathlib import Path

import pytest

from entrypoints.evaluation import predict
from entrypoints.web.training_runs import status as training_status
from entrypoints.web.training_runs.status import read_training_status


def write_state(folder: Path, step: int, max_steps: int = 100) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {"global_step": step, "max_steps": max_steps, "epoch": step / 10, "log_history": []}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def write_checkpoint(folder: Path, step: int, max_steps: int = 100, **record) -> None:
    write_state(folder, step, max_steps)
    (folder / "optimizer.pt").write_bytes(b"")
    record = {"made_with": {}, "files": {"optimizer.pt": 0}, "step": step, "sequence": step, **record}
    (folder / "checkpoint.json").write_text(json.dumps(record))


def write_log(folder: Path, *events: dict, end: bytes = b"") -> None:
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "training_log.jsonl").write_bytes(lines.encode() + end)


def test_a_folder_without_a_run_has_no_status(tmp_path):
    assert read_training_status(tmp_path) is None
    assert read_training_status(tmp_path / "no") is None


def test_curves_step_and_epoch_come_from_the_training_log(tmp_path):
    write_log(
        tmp_path,
        {"step": 2, "epoch": 0.2, "time": 100.0, "loss": 3.0, "learning_rate": 0.1, "grad_norm": 1.5},
        {"step": 4, "epoch": 0.4, "time": 104.0, "loss": 2.0, "learning_rate": 0.05, "grad_norm": 1.0},
        {"step": 4, "epoch": 0.4, "time": 110.0, "eval_loss": 2.5, "eval_runtime": 6.0},
        {"step": 4, "epoch": 0.4, "time": 111.0, "train_loss": 2.5, "total_flos": 9, "train_runtime": 11.0},
    )
    status = read_training_status(tmp_path, now=112.0)
    assert (status.step, status.total_steps, status.epoch, status.state) == (4, None, 0.4, "running")
    assert status.curves == {
        "loss": {2: 3.0, 4: 2.0},
        "learning_rate": {2: 0.1, 4: 0.05},
        "grad_norm": {2: 1.5, 4: 1.0},
        "eval_loss": {4: 2.5},
    }
    assert (status.elapsed_seconds, status.remaining_seconds) == (8.0, None)


def test_the_number_of_steps_comes_from_the_newest_checkpoint(tmp_path):
    write_checkpoint(tmp_path / "checkpoint-9", 9, max_steps=50)
    write_checkpoint(tmp_path / "checkpoint-20", 20)
    write_log(tmp_path, *({"step": step, "time": 1000.0 + 2 * step, "loss": 1.0} for step in (10, 20)))
    status = read_training_status(tmp_path, now=1041.0)
    assert (status.step, status.total_steps) == (20, 100)
    assert (status.elapsed_seconds, status.remaining_seconds) == pytest.approx((40.0, 160.0))  # 2 seconds per step
    assert [one.folder.name for one in status.checkpoints] == ["checkpoint-9", "checkpoint-20"]


def test_the_pause_before_a_resumed_run_does_not_count_as_training_time(tmp_path):
    write_checkpoint(tmp_path / "checkpoint-20", 20)
    times = {10: 0.0, 20: 20.0, 30: 90_000.0, 40: 90_020.0}
    write_log(tmp_path, *({"step": step, "time": time, "loss": 1.0} for step, time in times.items()))
    assert read_training_status(tmp_path, now=90_021.0).remaining_seconds == pytest.approx(120.0)


def test_a_finished_run_reports_its_runtime(tmp_path):
    write_state(tmp_path, 5)
    (tmp_path / "train_results.json").write_text('{"train_runtime": 12.5}')
    status = read_training_status(tmp_path)
    assert (status.state, status.elapsed_seconds, status.remaining_seconds) == ("finished", 12.5, None)


@pytest.mark.parametrize(
    "end", [b'{"step": 3, "lo', b"\xff\xfe\n", b"[1]\nnull\n3\n", b"[" * 100_000 + b"\n", b"\x00\n"]
)
def test_damaged_lines_of_the_training_log_are_skipped(end, tmp_path):
    write_log(tmp_path, {"step": 1, "time": 1.0, "loss": 3.0}, {"step": 2, "time": 2.0, "loss": 2.0}, end=end)
    assert read_training_status(tmp_path).curves == {"loss": {1: 3.0, 2: 2.0}}


@pytest.mark.parametrize("value", ["null", "NaN", "1e999", "1" * 400, "-1e301", '"3"', "true", "[]", "{}"])
@pytest.mark.parametrize("name", ["step", "time", "epoch", "loss"])
def test_a_value_that_is_not_a_finite_number_is_skipped(name, value, tmp_path):
    write_log(tmp_path, {"step": 1, "time": 1.0, "loss": 3.0}, end=f'{{"step": 2, "{name}": {value}}}\n'.encode())
    assert read_training_status(tmp_path).curves == {"loss": {1: 3.0}}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"log_history": [], "global_step": 3', "\x00", '{"epoch": []}']
)
def test_a_half_written_json_file_is_treated_as_absent(text, tmp_path):
    for name in ("trainer_state.json", "train_results.json", "predict_results.json"):
        (tmp_path / name).write_text(text)
    (tmp_path / "generated_predictions.jsonl").write_text('{"prompt": "a", "reference": "b", "prediction": "c"}\n{"pro')
    status = read_training_status(tmp_path)
    assert status.samples == [{"prompt": "a", "reference": "b", "prediction": "c"}]
    assert (status.scores, status.step, status.epoch) == ({}, 0, None)


def test_only_complete_folders_named_checkpoint_and_a_number_are_checkpoints(tmp_path):
    write_checkpoint(tmp_path / "checkpoint-3", 3)
    for name in (
        "checkpoint-²",
        "checkpoint-٣",
        "checkpoint-1-merged",
        "checkpoint-",
        "checkpoint--1",
        "my-checkpoint-1",
    ):
        write_checkpoint(tmp_path / name, 9)
    (tmp_path / "checkpoint-5").mkdir()
    write_state(tmp_path / "checkpoint-6", 6)  # incomplete: it has no record
    (tmp_path / "checkpoint-7").write_text("a file")
    status = read_training_status(tmp_path)
    assert ([one.folder.name for one in status.checkpoints], status.step) == (["checkpoint-3"], 3)


def test_the_file_names_are_those_that_evaluation_writes():
    assert (training_status.PREDICTIONS_FILE, training_status.SCORES_FILE) == (
        predict.PREDICTIONS_FILE,
        predict.SCORES_FILE,
    )


@pytest.mark.parametrize("value", ["1e15", "-1", "1" * 300])
@pytest.mark.parametrize("name", ["step", "time", "epoch"])
def test_a_count_out_of_range_is_skipped(name, value, tmp_path):
    end = f'{{"step": 2, "{name}": {value}, "loss": 1.0}}\n'.encode()
    write_log(tmp_path, {"step": 1, "time": 1.0, "loss": 3.0}, end=end)
    status = read_training_status(tmp_path)
    assert status.step <= 2
    assert (status.elapsed_seconds, status.epoch) == (None, None)


def test_a_clock_that_was_set_back_gives_no_negative_time(tmp_path):
    write_state(tmp_path, 2)
    write_log(tmp_path, {"step": 1, "time": 100.0, "loss": 1.0}, {"step": 2, "time": 5.0, "loss": 1.0})
    status = read_training_status(tmp_path, now=5.0)
    assert (status.elapsed_seconds, status.remaining_seconds) == (0.0, 0.0)


def test_only_the_end_of_a_huge_log_is_read_and_no_pipe(tmp_path):
    """The page reads it every few seconds; a pipe would never end."""
    os.mkfifo(tmp_path / "trainer_state.json")
    with (tmp_path / "training_log.jsonl").open("wb") as stream:
        stream.truncate(10**12)
        stream.seek(0, os.SEEK_END)
        stream.write(b'\n{"step": 7, "loss": 1.0}\n')
    assert read_training_status(tmp_path).curves == {"loss": {7: 1.0}}
