"""What is read of a run's folder."""

import json
import os
import struct
from pathlib import Path

import pytest

from entrypoints import evaluation
from entrypoints.web import run_record
from entrypoints.web.run_record import read_events, read_run


def state(step: int, *history: dict, steps: int = 100) -> str:
    return json.dumps({"global_step": step, "max_steps": steps, "epoch": step / 10, "log_history": list(history)})


def checkpoint(folder: Path, step: int, time: float, *history: dict) -> None:
    file = folder / f"checkpoint-{step}" / "trainer_state.json"
    file.parent.mkdir(parents=True)
    file.write_text(state(step, *history))
    os.utime(file, (time, time))


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def event(step: int, tag: str, value: float, time: float) -> bytes:
    """As TensorBoard writes a scalar: TFRecord around the protobuf messages Event, Summary and Value."""

    def block(number: int, data: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(data)) + data

    scalar = block(1, tag.encode()) + varint(2 << 3 | 5) + struct.pack("<f", value)
    message = varint(1 << 3 | 1) + struct.pack("<d", time) + varint(2 << 3) + varint(step) + block(5, block(1, scalar))
    return struct.pack("<QI", len(message), 0) + message + bytes(4)


def test_a_folder_without_a_run_holds_none(tmp_path):
    assert read_run(tmp_path) is None
    assert read_run(tmp_path / "no") is None


def test_the_newest_checkpoint_counts_and_the_pace_comes_from_two(tmp_path):
    checkpoint(tmp_path, 9, 1000.0, {"step": 9, "loss": 3.0, "epoch": 0.9})
    checkpoint(tmp_path, 20, 1022.0, {"step": 9, "loss": 3.0}, {"step": 20, "loss": 2.0, "learning_rate": 0.1})
    run = read_run(tmp_path)
    assert (run.step, run.steps, run.finished) == (20, 100, False)
    assert run.curves == {"loss": {9: 3.0, 20: 2.0}, "learning_rate": {20: 0.1}}
    assert (run.elapsed, run.left) == pytest.approx((40.0, 160.0))  # 2 seconds a step
    assert run.checkpoints == ["checkpoint-9", "checkpoint-20"]


def test_numbers_of_the_whole_run_are_no_curves(tmp_path):
    (tmp_path / "trainer_state.json").write_text(
        state(5, {"step": 5, "train_loss": 1.0, "total_flos": 9, "train_runtime": 3})
    )
    (tmp_path / "train_results.json").write_text('{"train_runtime": 12.5}')
    run = read_run(tmp_path)
    assert (run.curves, run.finished, run.elapsed, run.left) == ({}, True, 12.5, 0.0)


def test_tensorboard_events_are_read_live(tmp_path):
    data = b"".join(event(step, "train/loss", 4 - step, 100.0 + 10 * step) for step in (1, 2, 300))
    folder = tmp_path / "runs" / "x"
    folder.mkdir(parents=True)
    (folder / "events.out.tfevents.1").write_bytes(data + event(300, "eval/loss", 0.5, 3100.0) + data[:20])
    run = read_run(tmp_path)
    assert run.curves == {"loss": {1: 3.0, 2: 2.0, 300: -296.0}, "eval_loss": {300: 0.5}}
    assert (run.step, run.left) == (300, None)  # of how many steps is not said there


@pytest.mark.parametrize("data", [b"", b"x", bytes(40), b"\xff" * 60, event(1, "other", 1.0, 1.0)[:-6]])
def test_events_that_are_damaged_end_the_reading(data):
    assert list(read_events(data)) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"log_history": [], "global_step": 3', "\x00"])
def test_a_half_written_state_counts_as_absent(text, tmp_path):
    (tmp_path / "trainer_state.json").write_text(text)
    (tmp_path / "predict_results.json").write_text(text)
    (tmp_path / "generated_predictions.jsonl").write_text('{"prompt": "a", "reference": "b", "prediction": "c"}\n{"pro')
    run = read_run(tmp_path)
    assert run.samples == [{"prompt": "a", "reference": "b", "prediction": "c"}]
    assert run.scores == {}


def test_the_file_names_are_those_that_evaluation_writes():
    assert (run_record.PREDICTIONS_FILE, run_record.SCORES_FILE) == (
        evaluation.PREDICTIONS_FILE,
        evaluation.SCORES_FILE,
    )
