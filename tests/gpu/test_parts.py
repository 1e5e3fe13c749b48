"""The parts of `make test-gpu` on a CPU, as far as they go there, and how they are run."""

import contextlib
import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))

import parts  # noqa: E402

pytestmark = pytest.mark.slow

ON_CPU = ("numbers", "half", "packed", "loss", "methods", "quantized", "batching", "refusal")


ONLY_GPUS = ("slots", *parts.SEVERAL_GPUS)


def run(*flags: str, seconds: int = 280) -> list[dict]:
    command = [sys.executable, FOLDER / "run.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines, done.stderr
    return lines


@pytest.mark.parametrize("name", ON_CPU)
def test_a_part_holds_on_a_cpu_with_tiny_models(name, tmp_path):
    """The others start `glm train` and are tests of their own in tests/train."""
    assert set(parts.PARTS) - set(ON_CPU) == {"resume", "zero2", "zero3", *ONLY_GPUS}
    try:
        found = parts.PARTS[name][0]("cpu", tmp_path, True)
    except parts.Skipped as reason:
        pytest.skip(str(reason))
    assert json.dumps(found)


@pytest.mark.parametrize("name", ONLY_GPUS)
def test_a_part_that_needs_more_gpus_says_how_many(name, tmp_path, monkeypatch):
    needed = 2 if name in parts.SEVERAL_GPUS else 1
    for device, found in (("cpu", 0), ("cuda", needed - 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda found=found: found)
        with pytest.raises(parts.Skipped, match=f"needs {needed} GPUs?, this machine has {found}"):
            parts.PARTS[name][0](device, tmp_path, True)


def test_the_part_of_a_divided_model_finds_the_answers_of_the_whole_one(tmp_path):
    """Both are the CPU here: tests/unit/engines/transformers/test_split_model.py has the hooks of several devices."""
    assert len(parts.split_over(("cpu", "cpu"), tmp_path)["prefix"]) == 24


def test_all_parts_fit_into_the_time_of_one_device_and_have_a_limit_of_their_own():
    limits = {name: seconds for name, (_, seconds) in parts.PARTS.items() if name not in parts.SEVERAL_GPUS}
    assert sum(limits.values()) <= 800  # nine minutes in all are enforced
    assert all(20 <= seconds <= 120 for _, seconds in parts.PARTS.values())


def test_every_part_writes_one_line_and_one_that_fails_or_is_too_slow_ends_no_other():
    lines = run("refusal", "numbers", "--small", "--device", "cuda", "--patience", "0.02")
    assert [line["part"] for line in lines] == ["refusal", "numbers"]
    assert lines == [{"part": "refusal", "ok": False, "error": "longer than 0 s"}, lines[1]]
    assert run("refusal", "--small", "--device", "cpu", "--patience", "12")[0]["ok"]


def test_a_part_for_which_no_time_is_left_has_failed():
    command = [sys.executable, FOLDER / "run.py", "refusal", "numbers", "--small", "--device", "cpu", "--patience", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines == [{"part": name, "ok": False, "error": "no time was left"} for name in ("refusal", "numbers")]


def test_a_training_that_a_part_started_ends_with_the_part(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    running = []

    def watch() -> None:
        while not stopped.wait(0.05):
            running.extend(line for line in command_lines() if "entrypoints\0train" in line and str(tmp_path) in line)

    stopped = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    lines = run("resume", "--small", "--device", "cpu", "--patience", "0.2")
    stopped.set()
    watcher.join()
    assert lines == [{"part": "resume", "ok": False, "error": "longer than 18 s"}]
    assert running, "the training had started"
    assert not [line for line in command_lines() if str(tmp_path) in line]


def command_lines() -> list[str]:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # ended meanwhile
            found.append(file.read_text(errors="replace"))
    return found


def test_the_packages_that_were_copied_to_the_machine_are_imported_first(tmp_path):
    """A wheel with a transformers that only says what it is."""
    sys.path.insert(0, str(FOLDER))
    import run as program

    with zipfile.ZipFile(tmp_path / "transformers-0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("transformers/__init__.py", "print('copied')")
    with program._unpacked(tmp_path) as packages:
        done = subprocess.run(
            [sys.executable, "-c", "import transformers"], env={"PYTHONPATH": packages}, capture_output=True
        )
    assert done.stdout == b"copied\n"


def test_the_benchmark_of_a_gpu_runs_with_a_tiny_model_on_a_cpu():
    program = FOLDER.parent / "bench" / "gpu_bench.py"
    command = [sys.executable, program, "--small", "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    trained = [(row["what"], row["tokens"]) for row in rows if row["what"].startswith("train")]
    assert trained == [(f"train {name}", length) for name in ("lora", "qlora", "full") for length in (32, 64)]
    assert [row["answers"] for row in rows if row["what"] == "decode"] == [1, 8, 64]
    assert {row["what"] for row in rows} >= {"start to ready", "first token"}
    assert all(row["share_of_limit"] > 0 for row in rows if "share_of_limit" in row)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_all_parts_hold_on_this_gpu():
    lines = run(seconds=590)
    assert all(line.get("ok") or "skipped" in line for line in lines), lines
