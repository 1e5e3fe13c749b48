"""A few sample rows, and short runs on the tiny model in float32 on the CPU."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from entrypoints.training.arguments import TrainArguments
from entrypoints.training.preflight.quick_checks import check_inputs, check_output_dir
from entrypoints.training.preparation import prepare
from entrypoints.training.run import train
from entrypoints.training.run_context import open_run

SHORT_RUN = {
    "max_steps": 6,
    "save_steps": 3,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "pre_seq_len": 8,
    "freeze_layers": 1,
    "device": "cpu",
}


@pytest.fixture(scope="session")
def sample_file(sample_rows, tmp_path_factory) -> Path:
    """24 rows of the bundled sample."""
    file = tmp_path_factory.mktemp("rows") / "train.jsonl"
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in sample_rows[:24])
    file.write_text("".join(lines), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def tune(toy_native, sample_file) -> Callable[..., Path]:
    """Train in this process: `tune(folder, method="lora")`; further fields override SHORT_RUN."""

    def run(output: Path, **fields) -> Path:
        fields = {
            "model_name_or_path": toy_native,
            "train_file": sample_file,
            "output_dir": output,
            **SHORT_RUN,
            **fields,
        }
        arguments = TrainArguments(**fields)
        deepspeed = check_inputs(arguments)
        check_output_dir(arguments)
        prepared = prepare(open_run(arguments, deepspeed))
        prepared.take_output_dir()
        return train(prepared)

    return run


@pytest.fixture(scope="session")
def logged() -> Callable[[Path], dict[int, float]]:
    """The loss that a finished run or a checkpoint has logged, by step."""

    def read(folder: Path) -> dict[int, float]:
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}

    return read
