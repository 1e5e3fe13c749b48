"""With validation rows: which steps are evaluated, which checkpoint is the best one, and --load-best."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from entrypoints.errors import UserError
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.checkpoints.folders import best_checkpoint, list_checkpoints
from entrypoints.training.loop.callbacks import EvaluateCheckpoints, SaveOnSignal
from entrypoints.training.result.report import write_reports
from entrypoints.web.training_runs.status import read_training_status


@pytest.fixture
def losses(monkeypatch):
    """Replace the validation loss by these values, by step; returns the steps that were evaluated."""

    def use(values):
        evaluated = []

        def evaluate(self, *_, **__):
            step = self.state.global_step
            evaluated.append(step)
            metrics = {"eval_loss": values.get(step, 9.0)}
            self.log(dict(metrics))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        monkeypatch.setattr(Trainer, "evaluate", evaluate)
        return evaluated

    return use


def steps(folder):
    return [one.step for one in list_checkpoints(folder)]


def test_each_checkpoint_is_evaluated_once_and_the_best_one_survives_the_limit(tune, losses, sample_file, tmp_path):
    evaluated = losses({1: 5.0, 2: 1.0, 3: 2.0, 4: 3.0, 5: 4.0})
    settings = {"max_steps": 5, "save_steps": 1, "save_total_limit": 2, "validation_file": sample_file}
    output = tune(tmp_path / "out", method="lora", **settings)
    assert evaluated == [0, 1, 2, 3, 4, 5]
    assert steps(output) == [2, 5]
    assert best_checkpoint(list_checkpoints(output)).eval_loss == 1.0
    write_reports(TrainArguments(tmp_path / "base", sample_file, output))
    assert "## Best checkpoint" in (output / "report.md").read_text()
    assert "| checkpoint-2 | 2 | 1.0000 |" in (output / "report.md").read_text()
    status = read_training_status(output)
    assert [one.folder.name for one in status.checkpoints] == ["checkpoint-2", "checkpoint-5"]
    assert status.best == status.checkpoints[0]


def test_the_last_step_of_an_epoch_is_evaluated_once(tune, losses, sample_file, tmp_path):
    """24 rows in batches of 8: three steps; the last one is saved and ends the epoch."""
    evaluated = losses({})
    batches = {"max_steps": None, "num_train_epochs": 2, "per_device_train_batch_size": 8, "save_steps": 3}
    tune(tmp_path / "out", method="lora", validation_file=sample_file, **batches)
    assert evaluated == [0, 3, 6]


def test_eval_steps_replace_the_evaluation_after_each_epoch(tune, losses, sample_file, tmp_path):
    evaluated = losses({})
    batches = {"max_steps": 6, "per_device_train_batch_size": 8, "save_steps": 50}
    tune(tmp_path / "out", method="lora", validation_file=sample_file, eval_steps=2, **batches)
    assert evaluated == [0, 2, 4, 6]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora", "ptuning"])
def test_load_best_makes_the_checkpoint_of_the_lowest_loss_the_result(
    method, tune, losses, sample_file, tmp_path, caplog
):
    """It is saved although step 2 is not a multiple of --save-steps."""
    caplog.set_level("INFO")
    losses({2: 1.0, 4: 2.0})
    settings = {"max_steps": 4, "save_steps": 4, "eval_steps": 2, "save_total_limit": 1}
    output = tune(tmp_path / "out", method=method, validation_file=sample_file, load_best=True, **settings)
    assert steps(output) == [2, 4]
    assert "the result is checkpoint-2, validation loss 1" in caplog.messages
    name = {"full": "model.safetensors", "lora": "adapter_model.safetensors", "ptuning": "prefix.safetensors"}[method]
    result, best, last = (
        load_file(folder / name) for folder in (output, output / "checkpoint-2", output / "checkpoint-4")
    )
    assert all(torch.equal(result[key], best[key].to(result[key].dtype)) for key in best)
    assert not all(torch.equal(best[key], last[key]) for key in best)


def test_without_load_best_the_result_is_the_last_step(tune, losses, sample_file, tmp_path):
    losses({2: 1.0, 4: 2.0})
    settings = {"max_steps": 4, "save_steps": 2, "validation_file": sample_file}
    output = tune(tmp_path / "out", method="lora", **settings)
    result, last = (load_file(folder / "adapter_model.safetensors") for folder in (output, output / "checkpoint-4"))
    assert all(torch.equal(result[key], last[key]) for key in last)


@pytest.mark.slow
def test_a_resumed_run_knows_the_best_checkpoint_before_it(tune, losses, sample_file, tmp_path):
    losses({3: 1.0, 6: 2.0, 9: 3.0})
    settings = {"method": "lora", "validation_file": sample_file, "load_best": True, "save_total_limit": 1}
    output = tune(tmp_path / "out", max_steps=3, **settings)
    tune(output, max_steps=9, resume="auto", **settings)
    assert steps(output) == [3, 9]
    assert best_checkpoint(list_checkpoints(output)).step == 3


@pytest.mark.slow
def test_losses_on_other_validation_rows_are_not_compared(tune, losses, sample_file, tmp_path):
    losses({3: 1.0, 6: 2.0})
    output = tune(tmp_path / "out", method="lora", max_steps=3, validation_file=sample_file)
    lines = sample_file.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(lines[:3]), encoding="utf-8")
    tune(output, method="lora", max_steps=6, validation_file=tmp_path / "other.jsonl", resume="auto")
    assert best_checkpoint(list_checkpoints(output)).step == 6


def test_a_signal_does_not_wait_for_an_evaluation():
    evaluations, signals = EvaluateCheckpoints(False, None), SaveOnSignal()
    signals.received = 15
    control, settings = TrainerControl(should_evaluate=True), TrainingArguments(output_dir="unused", use_cpu=True)
    for callback in (evaluations, signals):
        callback.on_step_end(settings, TrainerState(global_step=3), control)
    assert (control.should_save, control.should_evaluate) == (True, False)
    assert evaluations.loss_at(3) is None


def test_warmup_ratio_is_a_share_of_all_steps(tune, tmp_path):
    """A quarter of eight steps: the rate grows in two steps and is at its peak in the third."""
    output = tune(tmp_path / "out", method="lora", max_steps=8, warmup_ratio=0.25, learning_rate=1e-3)
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    expected = [0.0, 0.5e-3, *(1e-3 * (8 - step) / 6 for step in range(2, 8))]
    assert rates == pytest.approx(expected)
    assert math.isclose(max(rates), 1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eval_steps": 5}, "--eval-steps needs --validation-file"),
        ({"load_best": True}, "--load-best needs --validation-file"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "--warmup-steps and --warmup-ratio exclude each other"),
        ({"warmup_ratio": 1.5}, "--warmup-ratio 1.5 is not in the range from 0 to below 1"),
        ({"eval_steps": 0}, "--eval-steps 0 is below 1"),
    ],
)
def test_flags_that_contradict_each_other_are_rejected(fields, message, sample_file, tmp_path):
    with pytest.raises(UserError, match=message):
        TrainArguments(tmp_path / "base", sample_file, tmp_path / "out", **fields)
