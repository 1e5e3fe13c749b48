"""Complete runs of `glm train` in separate processes, on the tiny model, in float32 on the CPU.

Each process imports for seconds, so each run here tests several properties.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROWS = 32
STEPS = 6
COMMON = {"max-steps": STEPS, "save-steps": 3, "logging-steps": 1, "device": "cpu", "learning-rate": 1e-3}


@dataclass(frozen=True)
class Run:
    """How a run ended."""

    code: int
    out: str
    err: str
    output: Path

    def losses(self) -> dict[int, float]:
        """Logged losses by step."""
        history = json.loads((self.output / "trainer_state.json").read_text())["log_history"]
        return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


@pytest.fixture(scope="session")
def close() -> dict[str, float]:
    """Tolerance between the losses of several processes and of one, for pytest.approx.

    One process sums the gradients of four rows in another order than two processes with two rows each: in float32 the
    losses of six steps differed by 2e-6.
    """
    return {"rel": 2e-5}


@pytest.fixture(scope="session")
def wait_for() -> Callable[[Path, subprocess.Popen], None]:
    """Wait until a running process has created a file."""

    def wait(file: Path, process: subprocess.Popen) -> None:
        deadline = time.monotonic() + 200
        while not file.exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, f"{file} was not created"
            time.sleep(0.05)

    return wait


@pytest.fixture(scope="session")
def rows(sample_rows, tmp_path_factory) -> Path:
    """32 rows of the bundled sample: 8 steps of 4."""
    file = tmp_path_factory.mktemp("rows") / "train.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sample_rows[:ROWS]))
    return file


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Without the variables of a launcher and without GPUs."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "NNODES", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return kept | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="session")
def start(toy_native, rows, environment) -> Callable[..., subprocess.Popen]:
    """Start `glm train`, if given by a `launcher` or `inside` another command; repeated flags override the first."""

    def begin(
        output: Path, *flags: object, launcher: tuple = (), inside: tuple = (), extra: dict | None = None
    ) -> subprocess.Popen:
        common = [part for name, value in COMMON.items() for part in (f"--{name}", value)]
        files = ["--model-name-or-path", toy_native, "--train-file", rows, "--output-dir", output]
        command = [*inside, sys.executable, *launcher, "-m", "entrypoints", "train", *files, *common, *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([str(part) for part in command], env=environment | (extra or {}), **pipes)

    return begin


@pytest.fixture(scope="session")
def run(start) -> Callable[..., Run]:
    """Start it and wait."""

    def complete(output: Path, *flags: object, **how) -> Run:
        process = start(output, *flags, **how)
        out, err = process.communicate(timeout=280)
        return Run(process.returncode, out, err, output)

    return complete


@pytest.fixture(scope="session")
def alone(run, tmp_path_factory) -> Run:
    """One process, batches of 4: the reference of the other runs."""
    done = run(tmp_path_factory.mktemp("alone") / "out", "--per-device-train-batch-size", 4)
    assert done.code == 0, done.err
    return done
