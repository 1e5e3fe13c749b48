"""Whole runs of `glm train` in processes of their own, on the toy, in float32 on the CPU.

A process takes seconds to import what it needs, so each run here shows several things at once.
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
        """What it has logged, by step."""
        history = json.loads((self.output / "trainer_state.json").read_text())["log_history"]
        return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


@pytest.fixture(scope="session")
def close() -> dict[str, float]:
    """How near the losses of several processes are to those of one, for pytest.approx.

    One process adds up the gradients of four rows in another order than two processes with two rows each: in float32
    the losses of six steps were seen to differ by 2e-6.
    """
    return {"rel": 2e-5}


@pytest.fixture(scope="session")
def wait_for() -> Callable[[Path, subprocess.Popen], None]:
    """Wait until a running process has made a file."""

    def wait(file: Path, process: subprocess.Popen) -> None:
        deadline = time.monotonic() + 200
        while not file.exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, f"{file} did not come"
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
    """No launcher's variables, no GPU."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "NNODES", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return kept | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="session")
def start(toy_native, rows, environment) -> Callable[..., subprocess.Popen]:
    """Start `glm train` (or `launcher` words that end in it, or it `inside` another command); later flags win."""

    def begin(
        output: Path, *words: object, launcher: tuple = (), inside: tuple = (), extra: dict | None = None
    ) -> subprocess.Popen:
        common = [word for name, value in COMMON.items() for word in (f"--{name}", value)]
        files = ["--model-name-or-path", toy_native, "--train-file", rows, "--output-dir", output]
        command = [*inside, sys.executable, *launcher, "-m", "entrypoints", "train", *files, *common, *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([str(word) for word in command], env=environment | (extra or {}), **pipes)

    return begin


@pytest.fixture(scope="session")
def run(start) -> Callable[..., Run]:
    """Start it and wait."""

    def whole(output: Path, *words: object, **how) -> Run:
        process = start(output, *words, **how)
        out, err = process.communicate(timeout=280)
        return Run(process.returncode, out, err, output)

    return whole


@pytest.fixture(scope="session")
def alone(run, tmp_path_factory) -> Run:
    """One process, batches of 4: what the others are held against."""
    done = run(tmp_path_factory.mktemp("alone") / "out", "--per-device-train-batch-size", 4)
    assert done.code == 0, done.err
    return done
