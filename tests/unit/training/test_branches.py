"""Which checkpoint is the newest one, which are deleted, and what happens to those of an earlier branch."""

import json
import shutil

import pytest
import torch

from entrypoints.errors import UserError
from entrypoints.training.checkpoints import store
from entrypoints.training.checkpoints.folders import list_checkpoints
from entrypoints.training.checkpoints.output_dir import prepare_output_dir
from entrypoints.training.checkpoints.training_log import read_events, write_events
from entrypoints.training.result.export import ExportOptions, export


@pytest.fixture
def save(tmp_path):
    """Write a small checkpoint of a step: `save(6)`; further fields go into its record."""

    def write(step, output=tmp_path, **fields):
        partial, target = output / ".partial", output / f"checkpoint-{step}"
        partial.mkdir(parents=True)
        torch.save({"step": torch.tensor(step)}, partial / "optimizer.pt")
        (partial / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 100}))
        sequence = store.next_sequence(output, None)
        record = {"made_with": {}, "step": step, "sequence": sequence, **fields}
        store.publish(partial, target, record)
        return target

    return write


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_checkpoint_is_the_last_one_written_not_the_highest_number(save, tmp_path):
    for step in (6, 10, 7):
        save(step)
    assert [one.step for one in list_checkpoints(tmp_path)] == [6, 10, 7]
    assert store.find_checkpoint("auto", tmp_path).step == 7


def test_checkpoints_of_older_versions_are_ordered_by_step_and_before_all_others(save, tmp_path):
    for step in (3, 100, 20):
        folder = save(step)
        record = json.loads((folder / "checkpoint.json").read_text())
        record = {
            "made_with": {},
            "files": {name: entry["size"] for name, entry in record["files"].items()},
        }
        (folder / "checkpoint.json").write_text(json.dumps(record))
    save(4)
    assert [one.step for one in list_checkpoints(tmp_path)] == [3, 20, 100, 4]


def test_what_was_just_written_is_never_deleted(save, tmp_path):
    """A folder with 6, 8 and 10, and an empty one with a higher number: the case in which the newest one was lost."""
    for step in (6, 8, 10, 7):
        save(step)
    (tmp_path / "checkpoint-20").mkdir()
    store.remove_oldest(tmp_path, 1)
    assert [one.step for one in list_checkpoints(tmp_path)] == [7]


def test_an_incomplete_checkpoint_is_not_kept_in_place_of_a_complete_one(save, tmp_path):
    for step in (1, 2, 3, 4):
        save(step)
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    store.remove_oldest(tmp_path, 2)
    assert [one.step for one in list_checkpoints(tmp_path)] == [2, 3]


@pytest.mark.parametrize(
    "name", ["checkpoint-²", "checkpoint-٣", "checkpoint-", "checkpoint-1-merged", "checkpoint-9x"]
)
def test_other_names_files_and_empty_folders_are_no_checkpoints(name, save, tmp_path):
    save(3).rename(tmp_path / name)
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert list_checkpoints(tmp_path) == []
    assert store.find_checkpoint("auto", tmp_path) is None


def test_the_checkpoint_of_the_lowest_validation_loss_is_kept_as_well(save, tmp_path):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)):
        save(step, eval_loss=loss)
        store.remove_oldest(tmp_path, 2)
    assert [one.step for one in list_checkpoints(tmp_path)] == [2, 4]
    store.remove_oldest(tmp_path, 1)
    assert [one.step for one in list_checkpoints(tmp_path)] == [2, 4]  # the newest one, to resume from


def test_an_export_of_a_run_without_a_result_names_its_complete_checkpoints(save, tmp_path):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        save(step, eval_loss=loss)
    (tmp_path / "checkpoint-1" / "optimizer.pt").unlink()
    with pytest.raises(
        UserError, match=r"name a checkpoint in it: checkpoint-2 \(lowest validation loss\), checkpoint-3$"
    ):
        export(tmp_path, tmp_path / "exported", ExportOptions())


class TestGoingBack:
    """A run that resumes from an earlier checkpoint."""

    @pytest.fixture
    def output(self, save, tmp_path):
        """Checkpoints 6, 8 and 10 of a finished run with a log."""
        folder = tmp_path / "out"
        for step in (6, 8, 10):
            save(step, folder)
        (folder / "trainer_state.json").write_text('{"global_step": 10}')
        (folder / "adapter_model.safetensors").write_text("tuned")
        (folder / "report.md").write_text("report")
        write_events(folder / "training_log.jsonl", [{"step": step, "loss": 1.0} for step in range(1, 11)])
        return folder

    def test_later_checkpoints_log_rows_and_result_are_moved_and_named_in_the_log(self, output, caplog):
        (output / "checkpoint-20").mkdir()
        prepare_output_dir(output, store.find_checkpoint(str(output / "checkpoint-6"), output))
        assert names(output) == ["checkpoint-6", "set-aside-1", "training_log.jsonl"]
        assert [event["step"] for event in read_events(output / "training_log.jsonl")] == [1, 2, 3, 4, 5, 6]
        aside = output / "set-aside-1"
        assert {"checkpoint-8", "checkpoint-10", "adapter_model.safetensors", "report.md"} <= set(names(aside))
        assert [event["step"] for event in read_events(aside / "training_log.jsonl")] == [7, 8, 9, 10]
        message = "continuing from step 6: moved checkpoint-8, checkpoint-10, the result, 4 log rows to"
        assert f"{message} {aside}" in caplog.text
        assert store.find_checkpoint("auto", output).step == 6

    def test_a_second_branch_gets_a_folder_of_its_own(self, output, save):
        for _ in range(2):
            prepare_output_dir(output, store.find_checkpoint(str(output / "checkpoint-6"), output))
            save(8, output)
        assert names(output / "set-aside-1") != names(output / "set-aside-2") == ["checkpoint-8"]

    def test_a_checkpoint_of_another_folder_sets_all_of_this_one_aside(self, output, save, tmp_path):
        other = tmp_path / "other"
        resumed = save(7, other)
        write_events(other / "training_log.jsonl", [{"step": step, "loss": 2.0} for step in range(1, 10)])
        prepare_output_dir(output, store.find_checkpoint(str(resumed), output))
        assert names(output) == ["set-aside-1", "training_log.jsonl"]
        events = read_events(output / "training_log.jsonl")
        assert [(event["step"], event["loss"]) for event in events] == [(step, 2.0) for step in range(1, 8)]
        assert len(read_events(output / "set-aside-1" / "training_log.jsonl")) == 10

    def test_continuing_from_the_last_checkpoint_keeps_the_result_until_there_is_a_new_one(self, output):
        prepare_output_dir(output, store.find_checkpoint("auto", output))
        kept = ["adapter_model.safetensors", "checkpoint-10", "checkpoint-6", "checkpoint-8", "training_log.jsonl"]
        assert names(output) == kept

    def test_a_checkpoint_that_is_a_link_to_another_disk_belongs_to_the_folder_of_the_link(self, output, tmp_path):
        (output / "checkpoint-10").rename(tmp_path / "elsewhere")
        (output / "checkpoint-10").symlink_to(tmp_path / "elsewhere")
        prepare_output_dir(output, store.find_checkpoint("auto", output))
        assert not list(output.glob("set-aside-*"))

    @pytest.mark.slow
    def test_a_run_that_goes_back_writes_on_from_there(self, tune, tmp_path):
        output = tune(tmp_path / "run", method="lora", save_steps=2)
        tune(output, method="lora", save_steps=2, save_total_limit=2, resume=str(output / "checkpoint-2"))
        assert [one.step for one in list_checkpoints(output)] == [4, 6]
        aside = sorted(path.name for path in (output / "set-aside-1").glob("checkpoint-*"))
        assert aside == ["checkpoint-4", "checkpoint-6"]
        steps = [event["step"] for event in read_events(output / "training_log.jsonl") if "loss" in event]
        assert steps == [1, 2, 3, 4, 5, 6]


class TestDamage:
    """Files of the right size with other contents, as a failing disk leaves them."""

    @pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt"])
    @pytest.mark.parametrize("damage", [b"\0", b"\xff"])
    def test_a_damaged_checkpoint_is_passed_over_with_one_line(self, name, damage, save, tmp_path, caplog):
        save(3)
        file = save(6) / name
        file.write_bytes(damage * file.stat().st_size)
        assert store.find_checkpoint("auto", tmp_path).step == 3
        assert f"skipped damaged checkpoint-6: {name} does not match its SHA-256" in caplog.text
        with pytest.raises(UserError, match=f"{name} does not match its SHA-256"):
            store.find_checkpoint(str(tmp_path / "checkpoint-6"), tmp_path)

    def test_every_file_that_a_run_reads_is_hashed(self, tune, tmp_path):
        folder = tune(tmp_path / "out", method="lora", max_steps=1) / "checkpoint-1"
        record = json.loads((folder / "checkpoint.json").read_text())
        written = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
        assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"} <= written
        assert set(record["files"]) == written - {"checkpoint.json"}
        assert all(len(entry["sha256"]) == 64 for entry in record["files"].values())

    def test_a_damaged_record_is_passed_over(self, save, tmp_path):
        save(3)
        file = save(6) / "checkpoint.json"
        for text in ("\0" * 100, "[]", '{"made_with": {}, "files": {}, "step": "6"}', '{"made_with": 1, "files": {}}'):
            file.write_text(text)
            assert store.find_checkpoint("auto", tmp_path).step == 3

    @pytest.mark.slow
    def test_a_run_that_passes_over_a_checkpoint_moves_it_away_and_writes_its_own(self, save, tune, tmp_path):
        output = tune(tmp_path / "run", method="lora")
        damaged = output / "checkpoint-6" / "optimizer.pt"
        damaged.write_bytes(b"\0" * damaged.stat().st_size)
        shutil.copytree(output, tmp_path / "interrupted", ignore=shutil.ignore_patterns("*.json", "*.safetensors"))
        shutil.copytree(output / "checkpoint-3", tmp_path / "interrupted" / "checkpoint-3", dirs_exist_ok=True)
        shutil.copytree(output / "checkpoint-6", tmp_path / "interrupted" / "checkpoint-6", dirs_exist_ok=True)
        tune(tmp_path / "interrupted", method="lora", resume="auto")
        assert [one.step for one in list_checkpoints(tmp_path / "interrupted")] == [3, 6]
        assert (tmp_path / "interrupted" / "set-aside-1" / "checkpoint-6").is_dir()
