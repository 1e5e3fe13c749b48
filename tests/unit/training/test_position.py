"""The position of a run in its rows: no row is skipped or repeated, whatever the batches of a resumed run are."""

import itertools
import json
import math

import pytest

from entrypoints.training.arguments import TrainArguments
from entrypoints.training.loop.trainer import GlmTrainer
from entrypoints.training.rows.collation import LengthGroupedSampler
from entrypoints.training.rows.position import Position, StepPlan, read_position

PLANS = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (2, 2, 1), (2, 1, 2), (3, 1, 1), (2, 3, 2), (24, 1, 1), (30, 1, 1)]


def arguments(tmp_path, **fields):
    return TrainArguments(tmp_path / "base", tmp_path / "rows", tmp_path / "out", **fields)


@pytest.mark.parametrize("rows", [1, 7, 24])
@pytest.mark.parametrize(("batch", "accumulation", "processes"), PLANS)
def test_a_plan_without_changes_has_the_steps_of_the_trainer(rows, batch, accumulation, processes, tmp_path):
    """The formula of `Trainer.set_initial_training_values` for a data loader that is divided among processes."""
    plan = StepPlan(rows, batch, accumulation, processes)
    batches = math.ceil(math.ceil(rows / batch) / processes)
    steps = max(batches // accumulation + (batches % accumulation > 0), 1)
    for epochs in (0.5, 1.0, 2.5, 3.0):
        run = arguments(tmp_path, num_train_epochs=epochs)
        last = plan.last_step(run, plan.first_position(), 0)
        assert last == math.ceil(epochs * steps)
        assert plan.epochs_until(last, plan.first_position(), 0) == math.ceil(epochs)
        for step in range(last + 1):  # also when it resumes after any step
            position = plan.advance(plan.first_position(), step)
            assert plan.last_step(run, position, step) == last
            assert position.epoch == step // steps


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(PLANS[:6], 2)))
def test_each_row_of_an_epoch_is_trained_on_once_after_the_batches_have_changed(first, second):
    """24 rows: the resumed run returns the rows that are left, in the order in which the epoch was begun."""
    lengths = [5 + number % 7 for number in range(24)]
    before, after = StepPlan(24, *first), StepPlan(24, *second)
    sampler = LengthGroupedSampler(lengths, before.rows_per_step, seed=1)
    order = list(sampler)
    for step in range(before.steps_per_epoch):
        start = before.advance(before.first_position(), step)
        resumed = LengthGroupedSampler(lengths, after.rows_per_step, seed=1)
        skipped = after.skipped_steps(start) * after.rows_per_step
        if start.rows:
            resumed.continue_from(start, skipped)
        assert len(list(resumed)) == len(resumed)
        if start.rows:
            assert order[: start.rows] + list(resumed)[skipped:] == order


def test_a_position_that_was_not_recorded_follows_from_the_step():
    plan = StepPlan(24, 2, 1, 1)
    assert read_position(None, plan, 14) == Position(1, 4, 2)
    assert read_position({"epoch": 3, "rows": 5, "ordered_by": 4}, plan, 14) == Position(3, 5, 4)


@pytest.mark.slow
@pytest.mark.parametrize("resumed", [{"per_device_train_batch_size": 5}, {"gradient_accumulation_steps": 3}, {}])
def test_a_run_that_resumes_with_other_batches_trains_on_each_row_once(resumed, tune, tmp_path, monkeypatch):
    seen = []
    training_step = GlmTrainer.training_step

    def recorded(self, model, inputs, *rest):
        seen.extend(row[row != 0].tolist() for row in inputs["input_ids"] * inputs["attention_mask"])
        return training_step(self, model, inputs, *rest)

    monkeypatch.setattr(GlmTrainer, "training_step", recorded)
    output = tmp_path / "out"
    tune(output, method="lora", max_steps=5)
    before = len(seen)
    assert before == 10
    (output / "finished.json").unlink(missing_ok=True)
    tune(output, method="lora", max_steps=None, num_train_epochs=1, resume="auto", **resumed)
    assert len(seen) == 24
    assert len({tuple(row) for row in seen}) == 24
    last = json.loads((output / "trainer_state.json").read_text())
    rows_per_step = 2 * resumed.get("gradient_accumulation_steps", 1)
    rows_per_step = resumed.get("per_device_train_batch_size", rows_per_step)
    assert (last["global_step"], last["epoch"]) == (5 + math.ceil(14 / rows_per_step), 1.0)
