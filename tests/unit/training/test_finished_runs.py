"""A finished run that is started again, and one that was stopped just before it was finished."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file

from entrypoints.checkpoint.manifest import check_manifest
from entrypoints.errors import UserError
from entrypoints.training import session
from entrypoints.training.arguments import TrainArguments

STEPS = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "device": "cpu"}


@pytest.fixture
def fine_tune(toy_native, sample_file, tmp_path):
    """A complete `glm train` in this process."""

    def run(output=tmp_path / "out", **fields):
        files = {"model_name_or_path": toy_native, "train_file": sample_file, "output_dir": output}
        return session.fine_tune(TrainArguments(**{**files, **STEPS, "method": "lora", **fields}), [])

    return run


@pytest.fixture(scope="module")
def shared(toy_native, sample_file, tmp_path_factory):
    """One finished run with 4 steps."""
    output = tmp_path_factory.mktemp("finished") / "out"
    files = {"model_name_or_path": toy_native, "train_file": sample_file, "output_dir": output}
    session.fine_tune(TrainArguments(**files, **STEPS, method="lora"), [])
    return output


@pytest.fixture
def finished(shared, tmp_path):
    return shutil.copytree(shared, tmp_path / "out")


def contents(folder):
    """Every file with its time of change."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def steps_of(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["step"] for entry in history if "loss" in entry]


@pytest.mark.slow
def test_the_same_command_says_that_it_is_finished_and_writes_nothing(finished, fine_tune, caplog):
    """Compose and the Kubernetes Job always pass --resume auto: a restarted pod must not change a finished model."""
    caplog.set_level(logging.INFO)
    before = contents(finished)
    assert fine_tune(resume="auto") == finished
    assert f"the run in {finished} is finished: it has 4 steps" in caplog.messages
    assert not any("loading" in message for message in caplog.messages)  # not even the base model
    assert contents(finished) == before


@pytest.mark.parametrize(
    "fields", [{"max_steps": 3}, {"learning_rate": 1e-5}, {"max_steps": None, "num_train_epochs": 0.3}]
)
def test_a_run_that_would_add_no_step_is_finished_too(fields, finished, fine_tune):
    before = contents(finished)
    fine_tune(resume="auto", **fields)
    assert contents(finished) == before


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"max_steps": 6}, {"max_steps": None, "num_train_epochs": 0.5}])
def test_more_steps_or_epochs_continue_a_finished_run(fields, finished, fine_tune):
    """24 rows in batches of 2: half an epoch is six steps."""
    fine_tune(resume="auto", **fields)
    assert steps_of(finished) == [1, 2, 3, 4, 5, 6]
    assert json.loads((finished / "finished.json").read_text())["step"] == 6
    assert not list(finished.glob("set-aside-*"))


def test_a_finished_run_on_other_rows_is_refused(finished, fine_tune, sample_file, tmp_path):
    lines = sample_file.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "more.jsonl").write_text("".join(lines[:20]), encoding="utf-8")
    before = contents(finished)
    with pytest.raises(UserError, match=r"out was trained on other rows .*in another --output-dir"):
        fine_tune(resume="auto", train_file=tmp_path / "more.jsonl")
    assert {path: time for path, time in contents(finished).items() if ".rows" not in str(path)} == {
        path: time for path, time in before.items() if ".rows" not in str(path)
    }


def test_a_finished_run_without_its_result_gets_it_from_the_last_checkpoint(finished, fine_tune, shared):
    """Killed after the last checkpoint: no step is trained, and the result is the same."""
    for name in ("finished.json", "trainer_state.json", "adapter_model.safetensors", "manifest.json", "report.md"):
        (finished / name).unlink()
    fine_tune(resume="auto")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (finished, shared))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert steps_of(finished) == [1, 2, 3, 4]
    assert check_manifest(finished, hashes=True) >= 3
    assert {"finished.json", "report.md", "report.html"} <= {file.name for file in finished.iterdir()}


def test_the_result_of_a_full_fine_tuning_from_its_last_checkpoint_has_the_dtype_of_the_base(fine_tune, tmp_path):
    output = fine_tune(method="full", max_steps=1)
    expected = load_file(output / "model.safetensors")
    for name in ("finished.json", "model.safetensors"):
        (output / name).unlink()
    fine_tune(method="full", max_steps=1, resume="auto")
    ours = load_file(output / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in ours.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
