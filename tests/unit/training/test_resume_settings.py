"""What a resumed run does with each setting that differs from its checkpoint; the table is in entrypoints/training."""

import json
import logging
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from entrypoints.dataset.columns import Columns
from entrypoints.errors import UserError
from entrypoints.training.arguments import METHODS, TRAINABLE_FIELDS, TrainArguments, flag_name
from entrypoints.training.checkpoints import resume_settings
from entrypoints.training.preparation import prepare
from entrypoints.training.run_context import open_run

GUIDE = Path(resume_settings.__file__).parents[1] / "README.md"
# continue exactly, or are part of a row of the table under another name
WITHOUT_RECORD = {
    "model_name_or_path", "train_file", "output_dir", "overwrite_output_dir", "resume", "validation_file", "test_file",
    "predict_with_generate", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "gradient_checkpointing", "max_broken_steps", "logging_steps", "save_steps", "save_total_limit", "eval_steps",
    "eval_samples",
    "load_best", "adapter", "fp16", "bf16",
    "preprocessing_num_workers", "device", "num_gpus", "num_processes", "deepspeed", "pre_seq_len",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tune, tmp_path_factory):
    """Three of six steps of a LoRA; the run is not finished."""
    output = tmp_path_factory.mktemp("trained") / "out"
    tune(output, method="lora", max_steps=3, warmup_steps=1)
    return output / "checkpoint-3"


@pytest.fixture
def resume(trained, toy_native, sample_file, tmp_path):
    """Prepare a run that resumes from a copy of the checkpoint; nothing is trained."""

    def prepared(world_size=1, **changed):
        given = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 2, "warmup_steps": 1, "method": "lora"}
        files = {"model_name_or_path": toy_native, "train_file": sample_file, "output_dir": tmp_path / "out"}
        arguments = TrainArguments(**{**files, **given, "device": "cpu", "resume": str(trained), **changed})
        return prepare(open_run(arguments, None), world_size)

    return prepared


REFUSED = {
    "seed": (43, "was saved with --seed 42, this run has --seed 43; resume with --seed 42"),
    "packing": (True, "was saved with no --packing, this run has --packing"),
    "method": ("full", "was saved with --method lora, this run has --method full"),
    "lora_rank": (4, "was saved with --lora-rank 8, this run has --lora-rank 4"),
    "lora_alpha": (16, "was saved with --lora-alpha 32, this run has --lora-alpha 16"),
    "lora_target": ("all-linear", "was saved with --lora-target attention, this run has --lora-target all-linear"),
    "max_source_length": (12, "on other rows (--max-source-length 512 then, --max-source-length 12 now)"),
    "max_target_length": (12, "on other rows (--max-target-length 512 then, --max-target-length 12 now)"),
    "max_train_samples": (20, "on other rows (no --max-train-samples then, --max-train-samples 20 now)"),
    "source_prefix": ("写：", "on other rows (--source-prefix  then, --source-prefix 写： now)"),
    "template": ("round", "on other rows (--template chatglm3 then, --template round now)"),
    "columns": (
        Columns("summary", "content"),
        "on other rows (the columns auto then, the columns summary, content, auto now)",
    ),
}
APPLIED = {
    "learning_rate": (1e-3, "--learning-rate 0.001 in place of 0.0002"),
    "lr_scheduler_type": ("cosine", "--lr-scheduler-type cosine in place of linear"),
    "warmup_steps": (2, "--warmup-steps 2 in place of 1"),
    "weight_decay": (0.1, "--weight-decay 0.1 in place of 0.0"),
    "label_smoothing": (0.1, "--label-smoothing 0.1 in place of 0.0"),
    "neftune_noise_alpha": (5.0, "--neftune-noise-alpha 5.0 in place of None"),
    "lora_dropout": (0.0, "--lora-dropout 0.0 in place of 0.1"),
    "num_train_epochs": (4.0, "--num-train-epochs 4.0 in place of 3.0"),
    "max_steps": (9, "--max-steps 9 in place of 3"),
    "bf16": (True, "precision bfloat16 in place of float32"),
    "per_device_train_batch_size": (4, "rows per optimizer step 4 in place of 2"),
    "gradient_accumulation_steps": (2, "rows per optimizer step 4 in place of 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_must_stay_is_named_with_both_values_and_a_remedy_that_works(name, resume):
    value, message = REFUSED[name]
    with pytest.raises(UserError, match=re.escape(message)):
        resume(**{name: value})
    assert resume().first_step == 3  # with the value of the checkpoint


@pytest.mark.parametrize("name", APPLIED)
def test_a_setting_that_may_change_is_logged_with_both_values(name, resume, caplog):
    caplog.set_level(logging.WARNING)
    value, message = APPLIED[name]
    resume(**{name: value})
    assert f"resuming with {message}" in caplog.messages


def test_the_same_settings_log_nothing(resume, caplog):
    caplog.set_level(logging.WARNING)
    resume(max_steps=3)
    assert caplog.messages == []


def test_the_same_rows_continue_from_another_path_format_and_split(resume, sample_file, tmp_path):
    rows = [json.loads(line) for line in sample_file.read_text(encoding="utf-8").splitlines()]
    (tmp_path / "a.json").write_text(json.dumps(rows[:10]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[10:]))
    assert resume(train_file=(tmp_path / "a.json", tmp_path / "b.jsonl")).start.rows == 6


@pytest.mark.parametrize("change", ["one more", "one fewer", "another order", "another text"])
def test_changed_contents_of_a_file_of_the_same_name_are_refused(change, resume, sample_file, tmp_path):
    lines = sample_file.read_text(encoding="utf-8").splitlines(keepends=True)
    changed = {
        "one more": [*lines, lines[0]],
        "one fewer": lines[:-1],
        "another order": [lines[1], lines[0], *lines[2:]],
        "another text": [lines[0].replace("类型", "种类"), *lines[1:]],
    }[change]
    (tmp_path / sample_file.name).write_text("".join(changed), encoding="utf-8")
    with pytest.raises(UserError, match=r"on other rows \(the content of --train-file has changed\)"):
        resume(train_file=tmp_path / sample_file.name)


@pytest.mark.parametrize(("processes", "batch", "accumulation"), [(2, 1, 1), (1, 1, 2)])
def test_the_same_rows_per_step_in_other_batches_continue_exactly(processes, batch, accumulation, resume, caplog):
    caplog.set_level(logging.WARNING)
    run = resume(processes, max_steps=3, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    assert (run.start.rows, run.plan.rows_per_step) == (6, 2)
    assert caplog.messages == []


def test_fewer_steps_than_the_checkpoint_has_are_refused(resume):
    with pytest.raises(UserError, match=r"has 3 steps, but the run ends at step 2; raise --max-steps"):
        resume(max_steps=2)


def test_other_precision_is_refused_with_deepspeed(resume):
    settings = resume().settings | {"deepspeed": True}
    with pytest.raises(UserError, match="of a run in float32, this run computes in bfloat16; resume in float32"):
        resume_settings.check_same(settings, settings | {"precision": "bfloat16"}, Path("checkpoint-3"))


@pytest.mark.parametrize(
    ("saved", "current", "message"),
    [
        ({"deepspeed": True}, {"deepspeed": False}, "with --deepspeed, this run has no --deepspeed"),
        ({"zero_stage": 2}, {"zero_stage": 3}, "of ZeRO stage 2, this run has a --deepspeed configuration of ZeRO"),
        ({"quantization_bit": 4}, {}, "with --quantization-bit 4, this run has no --quantization-bit"),
        ({"method": "ptuning", "pre_seq_len": 8}, {"method": "ptuning", "pre_seq_len": 16}, "with --pre-seq-len 8"),
        ({"method": "freeze", "freeze_layers": 1}, {"method": "freeze", "freeze_layers": 2}, "with --freeze-layers 1"),
    ],
)
def test_states_of_another_shape_are_refused(saved, current, message, resume):
    settings = resume().settings
    with pytest.raises(UserError, match=message):
        resume_settings.check_same(settings | saved, settings | current, Path("checkpoint-3"))


def test_a_checkpoint_of_an_older_version_resumes_although_it_recorded_less(trained, resume, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "old" / "checkpoint-3")
    record = json.loads((folder / "checkpoint.json").read_text())
    made_with = {name: record["made_with"][name] for name in ("method", "lora_rank", "processes", "zero_stage")}
    files = {name: entry["size"] for name, entry in record["files"].items()}
    (folder / "checkpoint.json").write_text(json.dumps({"made_with": made_with, "files": files}))
    run = resume(resume=str(folder))
    assert (run.first_step, run.start.rows) == (3, 6)


def test_a_new_learning_rate_schedule_and_weight_decay_are_those_of_the_flags(trained, tune, tmp_path):
    """The rate of step n + 1 of a linear schedule of 8 steps with a warmup of 1, from the formula."""
    changed = {"learning_rate": 1e-3, "weight_decay": 0.25, "max_steps": 8, "warmup_steps": 1, "save_steps": 8}
    output = tune(tmp_path / "out", method="lora", resume=str(trained), **changed)
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    rates = {entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry}
    for step in range(4, 9):
        assert rates[step] == pytest.approx(1e-3 * (8 - (step - 1)) / 7)
    state = torch.load(output / "checkpoint-8" / "optimizer.pt", weights_only=True)
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.25, 0.0]


def test_new_intervals_are_used(trained, tune, tmp_path):
    output = tune(tmp_path / "out", method="lora", resume=str(trained), max_steps=6, warmup_steps=1, save_steps=1)
    assert sorted(folder.name for folder in output.glob("checkpoint-*")) == [
        "checkpoint-4", "checkpoint-5", "checkpoint-6",
    ]  # fmt: skip


def test_every_setting_is_in_the_table_of_the_guide():
    trainable = {name for method in METHODS for name in TRAINABLE_FIELDS[method]} - {"prefix_length"}
    recorded = {"method", *trainable, *resume_settings.SAME, *resume_settings.ROWS, *resume_settings.APPLIED}
    known = {field.name for field in fields(TrainArguments)}
    assert len(known) > 45
    assert known == (recorded - set(resume_settings.NOT_FLAGS)) | WITHOUT_RECORD
    table = GUIDE.read_text(encoding="utf-8").partition("| changed since the checkpoint |")[2].partition("\n\n")[0]
    described = set(re.findall(r"`(--[a-z0-9-]+)`", table))
    assert {flag_name(name) for name in recorded - {"columns", "precision", "rows_per_step"}} <= described
