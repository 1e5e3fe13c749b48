"""Checkpoints: whole or not there, and the way back. Trap names (G4, G5, G7) are those."""

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from entrypoints.checkpoint.adapters import LORA_FILE, PREFIX_FILE
from entrypoints.errors import UserError
from entrypoints.training import checkpoints, methods
from entrypoints.training.watching import BrokenSteps, Interrupts

METHOD_NAMES = ["full", "freeze", "lora", "ptuning"]


@pytest.fixture(scope="module")
def straight(tune, tmp_path_factory):
    """Six steps of each method in one go, with a checkpoint after the third; batches of two of 24 rows."""
    folder = tmp_path_factory.mktemp("straight")
    return {method: tune(folder / method, method=method) for method in METHOD_NAMES}


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_three_steps_and_three_resumed_ones_are_six_steps(method, straight, tune, logged, tmp_path):
    """G7: losses and weights of float32 runs with dropout agree to the last bit."""
    output = tmp_path / "out"
    output.mkdir()
    shutil.copytree(straight[method] / "checkpoint-3", output / "checkpoint-3")
    tune(output, method=method, resume="auto")
    assert logged(output) == logged(straight[method])
    assert set(logged(output)) == {1, 2, 3, 4, 5, 6}
    for file in straight[method].glob("*.safetensors"):
        ours, theirs = load_file(output / file.name), load_file(file)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_resumed_in_its_second_epoch_sees_the_rows_it_had_before_it(tune, logged, tmp_path):
    """G7: 12 steps an epoch; the order of the second one depends on the seed alone, not on what ran before."""
    whole = tune(tmp_path / "whole", max_steps=16, save_steps=14)
    output = tmp_path / "out"
    output.mkdir()
    shutil.copytree(whole / "checkpoint-14", output / "checkpoint-14")
    tune(output, max_steps=16, save_steps=14, resume=str(output / "checkpoint-14"))
    assert logged(output) == logged(whole)


def test_a_checkpoint_holds_what_the_tutorials_tree_shows(straight):
    names = {file.name for file in (straight["full"] / "checkpoint-3").iterdir()}
    assert names >= {"config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert names >= {"trainer_state.json", "training_args.bin", "tokenizer.json", "tokenizer_config.json"}
    assert names >= {"prompt.json", "manifest.json", "checkpoint.json"}
    beside = {file.name for file in straight["full"].iterdir()}
    assert beside >= {"all_results.json", "train_results.json", "trainer_state.json", "checkpoint-6"}


class TestResume:
    """Which checkpoint is taken."""

    @pytest.fixture
    def output(self, straight, tmp_path):
        for step in (3, 6):
            shutil.copytree(straight["lora"] / f"checkpoint-{step}", tmp_path / "out" / f"checkpoint-{step}")
        return tmp_path / "out"

    def test_auto_takes_the_newest_by_number_not_by_age_or_spelling(self, output):
        shutil.copytree(output / "checkpoint-6", output / "checkpoint-12")
        (output / "checkpoint-old").mkdir()
        assert checkpoints.to_resume("auto", output).folder.name == "checkpoint-12"

    @pytest.mark.parametrize(
        ("damage", "told"),
        [
            (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
            (lambda folder: (folder / "checkpoint.json").unlink(), "no checkpoint.json"),
            (lambda folder: (folder / "checkpoint.json").write_text("{"), "checkpoint.json is damaged"),
            (lambda folder: (folder / "rng_state.pth").write_bytes(b"half"), "rng_state.pth has 4 bytes, not "),
        ],
    )
    def test_an_incomplete_one_is_passed_over_by_name(self, damage, told, output, caplog):
        damage(output / "checkpoint-6")
        assert checkpoints.to_resume("auto", output).step == 3
        assert f"passed over checkpoint-6: {told}" in caplog.text
        with pytest.raises(UserError, match=told):
            checkpoints.to_resume(str(output / "checkpoint-6"), output)

    def test_a_checkpoint_without_optimizer_is_refused_in_words(self, output):
        """G7: what `save_only_model` of other trainers leaves."""
        folder = output / "checkpoint-6"
        record = json.loads((folder / "checkpoint.json").read_text())
        del record["files"]["optimizer.pt"]
        (folder / "checkpoint.json").write_text(json.dumps(record))
        with pytest.raises(UserError, match="a model without the state of the optimizer"):
            checkpoints.to_resume(str(folder), output)

    def test_no_complete_one_at_all_is_a_mistake_but_none_at_all_a_start(self, output, tmp_path):
        for step in (3, 6):
            (output / f"checkpoint-{step}" / "optimizer.pt").unlink()
        with pytest.raises(UserError, match=r"no checkpoint .* is complete \(checkpoint-6: .*checkpoint-3: "):
            checkpoints.to_resume("auto", output)
        assert checkpoints.to_resume("auto", tmp_path / "nowhere") is None

    def test_another_method_cannot_go_on(self, output, tune):
        with pytest.raises(UserError, match="was made with --method lora, not full"):
            tune(output, resume="auto")

    @pytest.mark.parametrize(
        ("fields", "told"),
        [
            ({"lora_rank": 4}, "--lora-rank 8, not 4"),
            ({"lora_alpha": 16}, "--lora-alpha 32, not 16"),
            ({"lora_target": "all-linear"}, "--lora-target attention, not all-linear"),
        ],
    )
    def test_what_was_learnt_cannot_go_on_in_another_shape(self, fields, told, output, tune):
        with pytest.raises(UserError, match=f"was made with {told}"):
            tune(output, method="lora", resume="auto", **fields)

    def test_it_cannot_go_on_on_another_base(self, output, tune, straight):
        with pytest.raises(UserError, match=r"was tuned on .*, whose weights are not those of"):
            tune(output, method="lora", resume="auto", model_name_or_path=straight["full"])


class TestSaving:
    """A save that fails."""

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
    def test_a_full_disk_keeps_the_checkpoint_before_it(self, error, tune, tmp_path, monkeypatch):
        """What a full disk makes of a plain write and of torch.save; tests/train fills a real one."""
        save, calls = methods.save, []

        def full(model, state, folder, *rest):
            save(model, state, folder, *rest)
            calls.append(folder)
            if len(calls) == 2:
                raise error

        monkeypatch.setattr(methods, "save", full)
        with pytest.raises(UserError, match=r"saving checkpoint-6 failed .*--resume auto"):
            tune(tmp_path / "out", method="lora")
        assert checkpoints.to_resume("auto", tmp_path / "out").step == 3
        assert not (tmp_path / "out" / "checkpoint-6").exists()
        assert not list((tmp_path / "out" / checkpoints.PARTIAL).iterdir())

    @pytest.mark.parametrize(
        ("method", "name"), [("full", "model.safetensors"), ("lora", LORA_FILE), ("ptuning", PREFIX_FILE)]
    )
    def test_a_tensor_saved_as_nothing_is_refused_where_it_is_saved(self, method, name, tune, tmp_path, monkeypatch):
        """G5: what ZeRO-3 saves when nothing gathers its parts."""
        save = methods.save

        def hollow(model, state, folder, *rest):
            save(model, state, folder, *rest)
            tensors = load_file(folder / name)
            save_file(tensors | {min(tensors): torch.empty(0)}, folder / name)

        monkeypatch.setattr(methods, "save", hollow)
        with pytest.raises(UserError, match=r"\[0\]"):
            tune(tmp_path / "out", method=method)
        assert not (tmp_path / "out" / "checkpoint-3").exists()

    def test_only_as_many_as_wanted_are_kept_the_newest(self, tune, tmp_path):
        output = tune(tmp_path / "out", method="lora", save_steps=1, save_total_limit=2)
        assert sorted(folder.name for folder in output.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]

    def test_a_save_replaces_an_older_one_of_the_same_step(self, tmp_path):
        for text in ("old", "new"):
            (tmp_path / "partial").mkdir()
            (tmp_path / "partial" / "file").write_text(text)
            checkpoints.publish(tmp_path / "partial", tmp_path / "checkpoint-1", {})
        assert (tmp_path / "checkpoint-1" / "file").read_text() == "new"
        assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-1"]


class TestBrokenSteps:
    """Steps that teach nothing."""

    @pytest.mark.parametrize(("loss", "cause"), [(float("nan"), "overflowed"), (0.0, "no label is left")])
    def test_three_in_a_row_end_the_run_with_the_likely_cause(self, loss, cause):
        """G4."""
        steps = BrokenSteps(3)
        steps.note(loss, False, 1)
        steps.note(1.0, False, 2)
        steps.note(loss, False, 3)
        steps.note(loss, False, 4)
        with pytest.raises(UserError, match=f"3 steps in a row, up to step 5: .*{cause}"):
            steps.note(loss, False, 5)

    def test_overflowing_gradients_may_skip_some_steps_but_not_thirty(self):
        steps = BrokenSteps(3)
        for step in range(29):
            steps.note(1.0, True, step)
        with pytest.raises(UserError, match="30 steps in a row overflowed"):
            steps.note(1.0, True, 29)

    def test_a_step_of_several_batches_counts_once(self, tune, tmp_path, monkeypatch):
        """G4: fp16's first skipped steps would end the run where gradients are accumulated."""
        noted = []
        monkeypatch.setattr(BrokenSteps, "note", lambda self, *told: noted.append(told))
        tune(tmp_path / "out", max_steps=2, gradient_accumulation_steps=3)
        assert [(skipped, step) for _, skipped, step in noted] == [(False, 1), (False, 2)]

    def test_one_that_is_no_number_is_borne_if_another_follows_and_not_at_the_end(self):
        steps = BrokenSteps(3)
        steps.note(float("nan"), False, 1)
        steps.note(1.0, False, 2)
        steps.end()
        steps.note(float("nan"), False, 3)
        with pytest.raises(UserError, match="1 steps in a row, up to step 3"):
            steps.end()


class TestInterrupts:
    """Signals; whole runs that get one are in tests/train."""

    @pytest.mark.parametrize(("number", "ends"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
    def test_a_signal_is_noted_and_ends_the_run_as_it_would_have(self, number, ends):
        interrupts, before = Interrupts(), signal.getsignal(number)
        with interrupts.caught():
            signal.raise_signal(number)
            signal.raise_signal(number)  # the launcher's copy of the terminal's
        assert signal.getsignal(number) is before
        with pytest.raises(ends):
            interrupts.raise_if_any()

    def test_a_second_signal_ends_at_once(self, monkeypatch):
        interrupts = Interrupts()
        monkeypatch.setattr("entrypoints.training.watching.SAME_SIGNAL_SECONDS", -1.0)
        with interrupts.caught():
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(SystemExit):
                signal.raise_signal(signal.SIGTERM)
