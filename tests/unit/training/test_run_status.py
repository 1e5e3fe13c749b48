"""run_status.json: the heartbeat of a run and how it ended, and the log file beside it."""

import json
import logging
import re
import signal
import sys
import time

import pytest
from processes import Process, glm
from scripted_engine import wait_until

from entrypoints import logs
from entrypoints.errors import UserError
from entrypoints.training.checkpoints.run_status import STALE_SECONDS, RunStatus, StatusFile
from entrypoints.training.checkpoints.training_log import read_events
from entrypoints.web.training_runs.status import read_training_status


def read(folder):
    return json.loads((folder / "run_status.json").read_text())


def end_with(folder, error=None):
    with StatusFile(folder, RunStatus(0, 9)).kept():
        assert read(folder)["state"] == "running"
        if error:
            raise error


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (UserError("the loss was nan", "lower --learning-rate"), "failed", "the loss was nan; lower --learning-rate"),
        (RuntimeError("CUDA out of memory"), "failed", "RuntimeError: CUDA out of memory"),
        (KeyboardInterrupt(), "stopped", "SIGINT"),
        (SystemExit(143), "stopped", "SIGTERM"),
    ],
)
def test_the_file_says_how_a_run_ended(error, state, message, tmp_path):
    with pytest.raises(type(error)):
        end_with(tmp_path, error)
    assert (read(tmp_path)["state"], read(tmp_path)["message"]) == (state, message)


def test_a_run_that_ends_well_is_finished(tmp_path):
    end_with(tmp_path)
    assert (read(tmp_path)["state"], read(tmp_path)["message"]) == ("finished", "")


def test_the_heartbeat_goes_on_while_the_run_is_busy(tmp_path):
    with StatusFile(tmp_path, RunStatus(0, 9), interval=0.01).kept():
        first = read(tmp_path)["heartbeat"]
        wait_until(lambda: read(tmp_path)["heartbeat"] > first)
    last = read(tmp_path)["heartbeat"]
    time.sleep(0.1)  # ten intervals: nothing may follow the end
    assert read(tmp_path)["heartbeat"] == last


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path):
    with StatusFile(tmp_path / "absent", RunStatus(0, 9)).kept():
        pass


def test_the_log_file_has_what_was_logged_without_secrets(tmp_path):
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logs._RedactingFormatter(True, ["glm-secret"]))
    logger = logging.getLogger("entrypoints.test")
    logging.getLogger().addHandler(handler)
    try:
        for append in (False, True):
            with logs.copied_to(tmp_path / "train.log", append):
                logger.warning("key glm-secret, 中文 \ud800")
    finally:
        logging.getLogger().removeHandler(handler)
    logger.warning("afterwards")
    lines = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    assert all(
        re.fullmatch(r"\d{4}-\d\d-\d\d .* WARNING entrypoints.test: key \*\*\*, 中文 .*", line) for line in lines
    )


def test_a_log_file_that_cannot_be_written_is_reported_and_the_run_goes_on(tmp_path, caplog):
    with logs.copied_to(tmp_path / "absent" / "train.log", append=False):
        pass
    assert "cannot write" in caplog.text


def start(toy_native, sample_file, folder, *flags):
    command = glm(
        "train", "--model-name-or-path", toy_native, "--train-file", sample_file, "--output-dir", folder / "run",
        "--method", "lora", "--max-steps", 100_000, "--save-steps", 2, "--logging-steps", 1, "--save-total-limit", 2,
        "--per-device-train-batch-size", 2, *flags,
    )  # fmt: skip
    return Process(command, folder / "output")


@pytest.mark.slow
def test_a_killed_run_and_one_that_gets_sigterm_show_as_stopped(toy_native, sample_file, tmp_path):
    folder = tmp_path / "run"

    def steps():
        return [event["step"] for event in read_events(folder / "training_log.jsonl") if "loss" in event]

    process = start(toy_native, sample_file, tmp_path)
    try:
        wait_until(lambda: len(steps()) > 4, 120)
        status = read_training_status(folder)
        assert (status.state, status.phase, status.total_steps) == ("running", "training", 100_000)
        assert status.settings["method"] == "lora"
        assert status.settings["lora_rank"] == "8"
        assert status.newest("tokens_per_second") > 0
        assert 0.05 < status.newest("memory_gib") < 64
        process.end(signal.SIGKILL)
        status = read_training_status(folder, now=time.time() + STALE_SECONDS + 1)
        assert (status.state, status.is_silent, status.remaining_seconds) == ("stopped", True, None)
        killed_at = steps()[-1]
        process = start(toy_native, sample_file, tmp_path, "--resume", "auto")
        wait_until(lambda: len(steps()) > 1 and steps()[-1] > killed_at, 120)
        assert read_training_status(folder).state == "running"
        assert process.end(signal.SIGTERM) == 143
        status = read_training_status(folder)
        assert (status.state, status.is_silent, status.message) == ("stopped", False, "SIGTERM")
        assert "received SIGTERM" in status.log
        assert status.log.count("loading ") == 2  # of both runs
    finally:
        process.end(signal.SIGKILL)
