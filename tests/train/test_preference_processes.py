"""Preference tuning in two processes: DeepSpeed's wrapped model has its adapter disabled for the reference."""

import json
import math

import pytest

pytestmark = pytest.mark.slow

DPO = ("--objective", "dpo", "--method", "lora", "--lora-dropout", 0, "--max-steps", 3)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    file = tmp_path_factory.mktemp("pairs") / "preferences.jsonl"
    rows = [{"prompt": f"{number}+1", "chosen": f"{number + 1}", "rejected": f"不知道{number}"} for number in range(24)]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def losses_alone(run, pairs, tmp_path_factory):
    """Of one process without DeepSpeed."""
    done = run(tmp_path_factory.mktemp("alone") / "out", *DPO, "--train-file", pairs)
    assert done.code == 0, done.err
    return done.losses()


@pytest.mark.parametrize("preset", ["zero2", "zero3"])
def test_two_processes_with_deepspeed_have_the_losses_of_one(preset, run, pairs, losses_alone, tmp_path, close):
    flags = ("--num-processes", 2, "--per-device-train-batch-size", 2, "--deepspeed", preset)
    done = run(tmp_path / "out", *DPO, "--train-file", pairs, *flags)
    assert done.code == 0, done.err
    assert done.losses() == pytest.approx(losses_alone, **close)
    assert losses_alone[1] == pytest.approx(math.log(2), abs=1e-5)
    assert losses_alone[3] < losses_alone[1]
