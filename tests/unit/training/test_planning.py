"""--dry-run --gpu-memory: a plan for GPUs that this machine lacks, without weights, data and output folder."""

import re
import shutil

import pytest
import torch

from entrypoints.__main__ import main

MODEL = ("--model-name-or-path", "THUDM/chatglm3-6b")


@pytest.fixture
def plan(capsys):
    """Output of `glm train --dry-run`, or its error line."""

    def run(*flags):
        code = main(["train", "--dry-run", *map(str, flags)])
        captured = capsys.readouterr()
        return captured.out if code == 0 else captured.err

    return run


def column(table, name):
    """The values of a column by row."""
    lines = [re.split(r" {2,}", line.strip()) for line in table.splitlines() if "  " in line.strip()]
    place = lines[0].index(name) + 1
    return {line[0]: line[place] for line in lines[1:]}


def test_a_name_and_a_size_are_enough(plan):
    out = plan(*MODEL, "--gpu-memory", 24, "--method", "lora")
    lines = out.splitlines()
    assert lines[0] == "one process; 24.0 GB free on each GPU, host memory is not checked"
    fits = column(out, "fits")
    assert (fits["as given"], fits["--gradient-checkpointing"]) == ("no", "yes")
    assert lines[-3] == "does not fit on 24.0 GB; --gradient-checkpointing would fit"
    given = "--model-name-or-path THUDM/chatglm3-6b --method lora"
    assert lines[-1].endswith(f"-m entrypoints train {given} --train-file FILE --output-dir DIR")
    remedy = plan(*MODEL, "--gpu-memory", 24, "--method", "lora", "--gradient-checkpointing")
    assert remedy.splitlines()[-3] == "fits on 24.0 GB"


def test_several_gpus_are_planned_on_a_machine_without_any(plan):
    assert not torch.cuda.is_available()
    one, four = (
        column(plan(*MODEL, "--gpu-memory=24", "--num-gpus", count, "--deepspeed", "zero3"), "optimizer")["as given"]
        for count in (1, 4)
    )
    assert one == "74.9 GB"  # 12 bytes for each of 6.2436e9 parameters: two moments and a float32 copy
    assert four == "18.7 GB"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        # 6.2436e9 parameters: float32 weights and two moments, and the result in 16 bits
        (["--method", "full"], "74.9 GB for each checkpoint .* one every 500 steps, all are kept .*; 12.5 GB for the"),
        (["--method", "full", "--save-steps", 100, "--save-total-limit", 2], "one every 100 steps, up to 3 at once"),
        (
            ["--method", "full", "--save-total-limit", 1, "--max-steps", 2000],
            r"up to 149.8 GB \(2 x 74.9 GB for checkpoints with the state of the optimizer, 12.5 GB for the result\)",
        ),
    ],
    ids=str,
)
def test_checkpoints_and_result_are_planned_too(plan, flags, line):
    assert re.match(f"disk: .*{line}", plan(*MODEL, "--gpu-memory", 80, *flags).splitlines()[-2])


def test_the_estimate_is_that_of_the_run_itself(plan, toy_native, sample_file, tmp_path):
    """The same model as a folder with only config.json and as a whole folder, on the CPU in float32."""
    shutil.copy(toy_native / "config.json", tmp_path)
    flags = ["--train-file", sample_file, "--output-dir", tmp_path / "out", "--no-bf16"]
    bare = plan("--model-name-or-path", tmp_path, *flags, "--gpu-memory", 24)
    here = plan("--model-name-or-path", toy_native, *flags, "--device", "cpu")
    for name in ("weights", "gradients", "optimizer", "activations"):
        assert column(bare, name)["as given"] == column(here, name)["as given"]
    disk = [float(re.search(r"disk: (\S+) MB for each checkpoint", out)[1]) for out in (bare, here)]
    assert disk[0] == pytest.approx(disk[1], rel=0.05)  # without the tokenizer
    assert not (tmp_path / "out").exists()


def test_a_card_without_bfloat16_is_planned_in_float32_unless_fp16_is_given(plan):
    weights = {
        flags: column(plan(*MODEL, "--gpu-memory", *flags, "--method", "lora"), "weights")["as given"]
        for flags in (("T4",), ("T4", "--fp16"), ("L4",))
    }
    assert weights == {("T4",): "25.0 GB", ("T4", "--fp16"): "12.5 GB", ("L4",): "12.5 GB"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu-memory", "x"], "--gpu-memory x is neither a known card nor a number of GB"),
        (["--gpu-memory", "24", "--method", "freeze", "--freeze-layers", "29"], "the model has 28 layers; train fewer"),
        (["--gpu-memory", "24", "--train-file", "absent.jsonl"], "absent.jsonl"),
        (["--gpu-memory", "24", "--deepspeed", "zero9"], "--deepspeed zero9 is neither a file nor a preset"),
        ([], "no output folder is given; add --output-dir DIR"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_with_the_remedy(plan, flags, message):
    error = plan(*MODEL, *flags)
    assert error.startswith("glm: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_planned_gpu_is_for_dry_runs_only(capsys):
    assert main(["train", *MODEL, "--gpu-memory", "24"]) == 1
    assert "--gpu-memory plans for a GPU that need not exist; add --dry-run" in capsys.readouterr().err


def test_a_model_that_is_not_here_leads_to_planning(plan, sample_file, tmp_path):
    error = plan(*MODEL, "--train-file", sample_file, "--output-dir", tmp_path / "out")
    assert "folder not found: THUDM/chatglm3-6b; " in error
    assert "to plan without it, add --dry-run --gpu-memory GB" in error
