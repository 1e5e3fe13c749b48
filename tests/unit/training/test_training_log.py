"""training_log.jsonl of a run: which events it has, and what a resumed or a fresh run in the same folder does to it."""

import json
import shutil
import subprocess
import sys
import time

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from entrypoints.training.checkpoints.training_log import TrainingLog, read_events
from entrypoints.training.output_files import TRAINING_LOG_FILE


def losses(folder):
    """(step, loss) of the training log of a run, in the order of the file."""
    return [(event["step"], event["loss"]) for event in read_events(folder / TRAINING_LOG_FILE) if "loss" in event]


@pytest.fixture
def log(tmp_path):
    """Log values at a step, as the Trainer calls the callback in a process of this rank."""
    callback, settings = TrainingLog(tmp_path), TrainingArguments(output_dir=str(tmp_path), use_cpu=True)

    def write(step, main=True, **values):
        state = TrainerState(global_step=step, epoch=step / 4, is_world_process_zero=main)
        callback.on_log(settings, state, TrainerControl(), logs=values)

    return write


def test_every_logged_event_is_one_json_object_with_step_epoch_and_unix_time(tune, logged, sample_file, tmp_path):
    begin = time.time()
    folder = tune(tmp_path / "out", method="lora", validation_file=sample_file)
    events = read_events(folder / TRAINING_LOG_FILE)
    assert dict(losses(folder)) == logged(folder)
    assert all(begin < event["time"] < time.time() and event["epoch"] >= 0 for event in events)
    assert all({"learning_rate", "grad_norm"} <= set(event) for event in events if "loss" in event)
    assert [event["step"] for event in events if "eval_loss" in event] == [0, 3, 6]


@pytest.mark.slow
def test_a_resumed_run_continues_the_log_and_a_fresh_run_clears_it(tune, tmp_path):
    folder = tune(tmp_path / "out", method="lora")
    before = losses(folder)
    shutil.rmtree(folder / "checkpoint-6")  # as if the run had been killed before: steps 4 to 6 are logged again
    (folder / "trainer_state.json").unlink()
    tune(folder, method="lora", resume="auto")
    assert losses(folder) == before
    tune(folder, method="lora", max_steps=2, overwrite_output_dir=True)
    assert [step for step, _ in losses(folder)] == [1, 2]


def test_only_rank_0_writes_and_a_value_that_is_not_finite_is_null(log, tmp_path):
    log(1, loss=2.5)
    log(1, main=False, loss=2.5)
    log(2, loss=float("nan"))
    lines = (tmp_path / TRAINING_LOG_FILE).read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [2.5, None]


def test_a_line_cut_off_by_a_crash_is_skipped(log, tmp_path):
    log(1, loss=2.5)
    with (tmp_path / TRAINING_LOG_FILE).open("a") as stream:
        stream.write('{"step": 2, "lo')
    assert [event["step"] for event in read_events(tmp_path / TRAINING_LOG_FILE)] == [1]


def test_the_name_of_the_file_can_be_imported_without_torch():
    code = "import sys; import entrypoints.training.output_files; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(
    "line",
    [
        b"[1]",
        b"null",
        b"\xff\xfe",
        b'{"loss": 1}',
        b'{"step": "3"}',
        b'{"step": 1e300}',
        b'{"step": true}',
        b"[" * 10**5,
    ],
)
def test_lines_that_are_no_events_are_skipped(line, tmp_path):
    """They may come with a received folder, in which a run is resumed."""
    (tmp_path / TRAINING_LOG_FILE).write_bytes(b'{"step": 1}\n' + line + '\n{"step": 2, "note": "\u2028"}\n'.encode())
    assert [event["step"] for event in read_events(tmp_path / TRAINING_LOG_FILE)] == [1, 2]
