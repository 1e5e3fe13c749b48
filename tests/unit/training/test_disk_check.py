"""The disk that a run needs: estimated before a model is loaded, compared with what runs write, and what helps."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from entrypoints.__main__ import main
from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.errors import UserError
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.methods import trainable_model
from entrypoints.training.preflight import disk_check
from entrypoints.training.run_context import open_run

SIX_B = ModelConfig(28, 4096, 32, 2, 128, 13696, 65024, 8192, 1e-5, 1)
METHODS = {
    "full": {},
    "freeze": {"freeze_layers": 2},
    "lora": {"lora_target": "all-linear", "lora_rank": 64},
    "ptuning": {"pre_seq_len": 128},
    "ptuning with MLP": {"method": "ptuning", "pre_seq_len": 128, "prefix_projection": True},
}


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.fixture
def context(toy_native, sample_file, tmp_path):
    def create(**fields):
        fields = {"method": "full", "device": "cpu", **fields}
        return open_run(TrainArguments(toy_native, sample_file, tmp_path / "out", **fields), None)

    return create


def estimate(run, steps):
    return disk_check.DiskPlan.of_run(run).estimate(steps)


def six_b(run):
    """The same run with the 6B in 16 bits."""
    files = SimpleNamespace(nbytes=2 * 6_243_584_000)
    base = SimpleNamespace(model_config=SIX_B, files=files, folder=run.base.folder)
    return replace(run, base=base, precision=replace(run.precision, bf16=True))


@pytest.fixture
def free_disk(monkeypatch):
    def set_to(size):
        monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=size))

    return set_to


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_checkpoints_and_result_are_as_large_as_estimated(name, tune, context, tmp_path):
    fields = {"method": name, **METHODS[name]}
    output = tune(tmp_path / "out", max_steps=2, save_steps=1, **fields)
    need = estimate(context(save_steps=1, **fields), steps=2)
    assert need.saved == len(list(output.glob("checkpoint-*"))) == 2
    written = size_of(output / "checkpoint-1")
    assert need.checkpoint - 2 * disk_check.SMALL_FILES < written <= need.checkpoint
    names = ("model.safetensors", "tokenizer*", "adapter*", "prefix*", "config.json")
    result = sum(file.stat().st_size for pattern in names for file in output.glob(pattern))
    assert need.result - 2 * disk_check.SMALL_FILES < result <= need.result


@pytest.mark.parametrize(
    ("fields", "steps", "count"),
    [
        ({"save_steps": 10}, 5, 1),
        ({"save_steps": 10}, 25, 3),
        ({"save_steps": 10, "save_total_limit": 1}, 25, 2),
        ({"save_steps": 10, "save_total_limit": 3}, 1000, 4),
        ({"save_steps": 10, "save_total_limit": 1, "validation_file": Path("dev.jsonl")}, 1000, 3),
    ],
    ids=str,
)
def test_a_new_checkpoint_is_written_before_the_oldest_is_removed(fields, steps, count, context):
    """With a validation file the best one is kept beside the newest."""
    assert estimate(context(**fields), steps).count == count


def test_a_full_run_of_the_6b_needs_room_for_its_optimizer(context, free_disk):
    """12.5 GB hold the result alone."""
    run = six_b(context(save_steps=500, save_total_limit=1))
    assert estimate(run, 400).checkpoint == pytest.approx(12 * 6.2436e9, rel=1e-3)
    free_disk(12_600_000_000)
    with pytest.raises(
        UserError, match=r"writes up to 87\.4 GB .*1 x 74\.9 GB for checkpoints .*12\.5 GB for the result.*12\.6 GB fr"
    ):
        disk_check.check_disk(run, 400)


@pytest.mark.parametrize("checkpoints", [1, 2, 3, 5])
def test_the_remedy_of_the_message_fits(checkpoints, context, free_disk):
    """--save-total-limit as high as possible, or one checkpoint at the end."""
    run = six_b(context(save_steps=100, save_total_limit=6))
    need = estimate(run, 1000)
    free_disk(checkpoints * need.checkpoint + need.result)
    with pytest.raises(UserError) as caught:
        disk_check.check_disk(run, 1000)
    flag, value = re.match(r"--(\S+) (\d+) would fit", caught.value.remedy).groups()
    changed = replace(run.arguments, **{flag.replace("-", "_"): int(value)})
    disk_check.check_disk(replace(run, arguments=changed), 1000)
    assert (flag, int(value)) == (("save-steps", 1000) if checkpoints == 1 else ("save-total-limit", checkpoints - 1))


def test_where_not_even_one_checkpoint_fits_the_missing_space_and_a_smaller_method_are_named(context, free_disk):
    run = six_b(context(save_steps=100))
    free_disk(20_000_000_000)
    with pytest.raises(
        UserError, match=r"free 67\.4 GB for one checkpoint .*; the checkpoints of --method lora are small"
    ):
        disk_check.check_disk(run, 1000)
    free_disk(20_000_000_000 + 67_440_000_000)
    disk_check.check_disk(replace(run, arguments=replace(run.arguments, save_steps=1000)), 1000)
    free_disk(20_000_000_000)
    disk_check.check_disk(replace(run, arguments=replace(run.arguments, method="lora")), 1000)


@pytest.mark.parametrize("fields", ["--max-steps 2 --save-steps 1", "--num-train-epochs 30 --save-steps 1"])
def test_the_disk_is_checked_before_the_model_is_loaded(
    fields, toy_native, sample_file, tmp_path, monkeypatch, free_disk, capsys
):
    monkeypatch.setattr(trainable_model, "load", None)  # not called
    free_disk(90_000_000)
    flags = (
        f"train --model-name-or-path {toy_native} --train-file {sample_file} --output-dir {tmp_path / 'out'} {fields}"
    )
    assert main(shlex.split(f"{flags} --device cpu")) == 1
    err = capsys.readouterr().err
    assert re.search(r"glm: the run writes up to .* MB free; --save-", err), err
    assert not list(tmp_path.glob("out/checkpoint-*"))


def test_what_a_new_run_replaces_counts_as_free(tune, context, free_disk, tmp_path):
    output = tune(tmp_path / "out", max_steps=2, save_steps=1)
    run = context(save_steps=1)
    need = estimate(run, 2)
    free_disk(need.peak - size_of(output / "checkpoint-1") - size_of(output / "checkpoint-2") - 1_000_000)
    disk_check.check_disk(run, 2)
    free_disk(0)
    with pytest.raises(UserError, match="its disk has"):
        disk_check.check_disk(run, 4)
