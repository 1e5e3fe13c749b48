"""Checkpoints: atomic saves, resuming, interrupts and invalid steps."""

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

from entrypoints.checkpoint.adapters import LORA_FILE, PREFIX_FILE
from entrypoints.checkpoint.manifest import check_manifest
from entrypoints.errors import UserError
from entrypoints.training.checkpoints import store
from entrypoints.training.checkpoints.folders import list_checkpoints
from entrypoints.training.loop.callbacks import InvalidStepCounter, SaveOnSignal
from entrypoints.training.methods import trainable_model

METHOD_NAMES = ["full", "freeze", "lora", "ptuning"]


@pytest.fixture(scope="module")
def straight(tune, tmp_path_factory):
    """Six uninterrupted steps of each method, with a checkpoint after the third; batches of two of 24 rows."""
    folder = tmp_path_factory.mktemp("straight")
    return {method: tune(folder / method, method=method) for method in METHOD_NAMES}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_three_steps_and_three_resumed_steps_equal_six_steps(method, straight, tune, logged, tmp_path):
    """Losses and weights of float32 runs with dropout are bitwise equal."""
    output = tmp_path / "out"
    output.mkdir()
    shutil.copytree(straight[method] / "checkpoint-3", output / "checkpoint-3")
    tune(output, method=method, resume="auto")
    assert logged(output) == logged(straight[method])
    assert set(logged(output)) == {1, 2, 3, 4, 5, 6}
    for file in straight[method].glob("*.safetensors"):
        ours, theirs = load_file(output / file.name), load_file(file)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_run_resumed_in_its_second_epoch_continues_with_the_same_row_order(tune, logged, tmp_path):
    """12 steps per epoch; the order of the second epoch depends on the seed alone."""
    whole = tune(tmp_path / "whole", max_steps=16, save_steps=14)
    output = tmp_path / "out"
    output.mkdir()
    shutil.copytree(whole / "checkpoint-14", output / "checkpoint-14")
    tune(output, max_steps=16, save_steps=14, resume=str(output / "checkpoint-14"))
    assert logged(output) == logged(whole)


def test_a_checkpoint_has_the_files_of_the_public_script(straight):
    names = {file.name for file in (straight["full"] / "checkpoint-3").iterdir()}
    assert names >= {"config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert names >= {"trainer_state.json", "training_args.bin", "tokenizer.json", "tokenizer_config.json"}
    assert names >= {"prompt.json", "manifest.json", "checkpoint.json"}
    output = {file.name for file in straight["full"].iterdir()}
    assert output >= {"all_results.json", "train_results.json", "trainer_state.json", "checkpoint-6"}


class TestResume:
    """Selection of the checkpoint."""

    @pytest.fixture
    def output(self, straight, tmp_path):
        for step in (3, 6):
            shutil.copytree(straight["lora"] / f"checkpoint-{step}", tmp_path / "out" / f"checkpoint-{step}")
        return tmp_path / "out"

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
            (lambda folder: (folder / "checkpoint.json").unlink(), "checkpoint.json is missing"),
            (lambda folder: (folder / "checkpoint.json").write_text("{"), "checkpoint.json is damaged"),
            (
                lambda folder: (folder / "checkpoint.json").write_text('{"files": {"../x": 1}, "made_with": {}}'),
                "checkpoint.json is damaged",
            ),
            (lambda folder: (folder / "rng_state.pth").write_bytes(b"half"), "rng_state.pth has 4 bytes, not "),
        ],
    )
    def test_an_incomplete_checkpoint_is_skipped_and_named(self, damage, message, output, caplog):
        damage(output / "checkpoint-6")
        assert store.find_checkpoint("auto", output).step == 3
        assert f"skipped incomplete checkpoint-6: {message}" in caplog.text
        with pytest.raises(UserError, match=message):
            store.find_checkpoint(str(output / "checkpoint-6"), output)

    def test_a_checkpoint_without_optimizer_state_is_rejected_with_a_clear_error_message(self, output):
        """As saved by `save_only_model` of other trainers."""
        folder = output / "checkpoint-6"
        record = json.loads((folder / "checkpoint.json").read_text())
        del record["files"]["optimizer.pt"]
        (folder / "checkpoint.json").write_text(json.dumps(record))
        with pytest.raises(UserError, match="a model without the state of the optimizer"):
            store.find_checkpoint(str(folder), output)

    def test_only_incomplete_checkpoints_are_an_error_and_no_checkpoint_is_a_fresh_start(self, output, tmp_path):
        for step in (3, 6):
            (output / f"checkpoint-{step}" / "optimizer.pt").unlink()
        with pytest.raises(UserError, match=r"no checkpoint .* is complete \(checkpoint-3: .*checkpoint-6: "):
            store.find_checkpoint("auto", output)
        assert store.find_checkpoint("auto", tmp_path / "nowhere") is None

    def test_another_method_cannot_resume(self, output, tune):
        with pytest.raises(UserError, match="was saved with --method lora, this run has --method full"):
            tune(output, resume="auto")

    def test_resuming_on_another_base_model_is_rejected(self, output, tune, straight):
        with pytest.raises(UserError, match=r"was tuned on .*, whose weights are not those of"):
            tune(output, method="lora", resume="auto", model_name_or_path=straight["full"])


class TestSaving:
    """Failed and replaced saves."""

    @pytest.fixture(params=[OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
    def full_disk_at(self, request, monkeypatch):
        """Let one of the saves of a run fail as a plain write or torch.save on a full disk; tests/train fills one."""
        save, calls = trainable_model.save, []

        def use(number):
            def fail(model, state, folder, *rest):
                save(model, state, folder, *rest)
                calls.append(folder)
                if len(calls) == number:
                    raise request.param

            monkeypatch.setattr(trainable_model, "save", fail)

        return use

    @pytest.mark.slow
    def test_a_checkpoint_that_cannot_be_saved_costs_neither_the_run_nor_earlier_checkpoints(
        self, full_disk_at, tune, tmp_path, caplog
    ):
        full_disk_at(2)  # of checkpoints 2, 4 and 6 and the result
        output = tune(tmp_path / "out", method="lora", save_steps=2)
        assert [one.step for one in list_checkpoints(output)] == [2, 6]
        assert "saving checkpoint-4 failed" in caplog.text
        assert check_manifest(output, hashes=True) >= 3
        assert not (output / store.PARTIAL).exists()

    @pytest.mark.slow
    def test_a_result_that_cannot_be_saved_leaves_the_checkpoints(self, full_disk_at, tune, tmp_path):
        full_disk_at(3)
        with pytest.raises(UserError, match=r"saving the result failed .*; the checkpoints are intact; fix the cause"):
            tune(tmp_path / "out", method="lora")
        assert store.find_checkpoint("auto", tmp_path / "out").step == 6

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["_save_optimizer_and_scheduler", "_save_rng_state"])
    def test_a_state_that_cannot_be_saved_costs_only_its_checkpoint(self, name, tune, tmp_path, monkeypatch, caplog):
        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Trainer, name, fail)
        output = tune(tmp_path / "out", method="lora")
        assert list_checkpoints(output) == []
        assert "saving checkpoint-6 failed ([Errno 28] No space left on device)" in caplog.text
        assert check_manifest(output, hashes=True) >= 3

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("method", "name"), [("full", "model.safetensors"), ("lora", LORA_FILE), ("ptuning", PREFIX_FILE)]
    )
    def test_a_tensor_saved_empty_is_rejected_at_the_save(self, method, name, tune, tmp_path, monkeypatch):
        """ZeRO-3 saves empty tensors when nothing gathers the partitions."""
        save = trainable_model.save

        def hollow(model, state, folder, *rest):
            save(model, state, folder, *rest)
            tensors = load_file(folder / name)
            save_file(tensors | {min(tensors): torch.empty(0)}, folder / name)

        monkeypatch.setattr(trainable_model, "save", hollow)
        with pytest.raises(UserError, match=r"\[0\]"):
            tune(tmp_path / "out", method=method)
        assert not (tmp_path / "out" / "checkpoint-3").exists()

    def test_save_total_limit_keeps_the_newest_checkpoints(self, tune, tmp_path):
        output = tune(tmp_path / "out", method="lora", save_steps=1, save_total_limit=2)
        assert sorted(folder.name for folder in output.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]

    def test_a_save_replaces_an_older_checkpoint_of_the_same_step(self, tmp_path):
        for text in ("old", "new"):
            (tmp_path / "partial").mkdir()
            (tmp_path / "partial" / "file").write_text(text)
            store.publish(tmp_path / "partial", tmp_path / "checkpoint-1", {"made_with": {}})
        assert (tmp_path / "checkpoint-1" / "file").read_text() == "new"
        assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-1"]


class TestInvalidStepCounter:
    """Consecutive steps without a usable loss."""

    @pytest.mark.parametrize(("loss", "cause"), [(float("nan"), "overflowed"), (0.0, "no label is left")])
    def test_three_in_a_row_end_the_run_with_the_likely_cause(self, loss, cause):
        steps = InvalidStepCounter(3)
        steps.record(loss, False, 1)
        steps.record(1.0, False, 2)
        steps.record(loss, False, 3)
        steps.record(loss, False, 4)
        with pytest.raises(UserError, match=f"3 consecutive steps, up to step 5: .*{cause}"):
            steps.record(loss, False, 5)

    def test_overflowing_gradients_may_skip_some_steps_but_not_thirty(self):
        steps = InvalidStepCounter(3)
        for step in range(29):
            steps.record(1.0, True, step)
        with pytest.raises(UserError, match="overflowed in 30 consecutive steps"):
            steps.record(1.0, True, 29)

    def test_a_step_of_several_batches_counts_once(self, tune, tmp_path, monkeypatch):
        """Otherwise the first skipped steps of fp16 would end a run with gradient accumulation."""
        recorded = []
        monkeypatch.setattr(InvalidStepCounter, "record", lambda self, *values: recorded.append(values))
        tune(tmp_path / "out", max_steps=2, gradient_accumulation_steps=3)
        assert [(skipped, step) for _, skipped, step in recorded] == [(False, 1), (False, 2)]

    def test_a_loss_that_is_not_finite_is_accepted_in_between_but_not_at_the_end(self):
        steps = InvalidStepCounter(3)
        steps.record(float("nan"), False, 1)
        steps.record(1.0, False, 2)
        steps.check_last()
        steps.record(float("nan"), False, 3)
        with pytest.raises(UserError, match="1 consecutive steps, up to step 3"):
            steps.check_last()


class TestInterrupts:
    """Signals; complete runs that receive one are in tests/train."""

    @pytest.mark.parametrize(("number", "ends"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
    def test_a_signal_is_recorded_and_ends_the_run_as_it_would_have(self, number, ends):
        interrupts, before = SaveOnSignal(), signal.getsignal(number)
        with interrupts.handling():
            signal.raise_signal(number)
            signal.raise_signal(number)  # the copy that the launcher forwards
        assert signal.getsignal(number) is before
        with pytest.raises(ends):
            interrupts.raise_received()

    def test_a_second_signal_ends_at_once(self, monkeypatch):
        interrupts = SaveOnSignal()
        monkeypatch.setattr("entrypoints.training.loop.callbacks.SAME_SIGNAL_SECONDS", -1.0)
        with interrupts.handling():
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(SystemExit):
                signal.raise_signal(signal.SIGTERM)
