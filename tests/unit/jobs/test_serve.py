"""What `glm serve` and `glm chat` answer before they load: flags that no GGUF file takes, packages that lack."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from entrypoints.conversation import load_chat
from entrypoints.engines import loading

JOBS = {"chat": ("chat", "--prompt", "你好", "--max-new-tokens", 2), "serve": ("serve", "--port", 0)}
WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1].split(",")))  # neither found nor imported
from entrypoints.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def recorded(toy_gguf, tmp_path) -> Path:
    """A file with the record that glm prepare writes beside it."""
    file = Path(shutil.copy(toy_gguf, tmp_path))
    fields = {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    file.with_name(f"{file.name}.json").write_text(json.dumps(fields))
    return file


@pytest.fixture
def damaged(recorded) -> Path:
    """The same with another last byte: nothing that loading would notice."""
    with recorded.open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)[0]
        stream.seek(-1, 2)
        stream.write(bytes([last ^ 1]))
    return recorded


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--dtype", "float16"), "--dtype float16 is not for a GGUF file; it has the precision it was written in"),
        (("--device", "cuda"), "--device cuda is not for a GGUF file; llama.cpp computes on the processor"),
        (("--device", "mps"), "--device mps is not for a GGUF file; llama.cpp computes on the processor"),
        (("--verify",), "toy.gguf.json is not beside it; leave it out, or have glm prepare make the file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_flag_that_a_gguf_file_has_no_use_for_is_refused_in_words(job, flags, words, toy_gguf, glm):
    assert words in glm(*JOBS[job], "--model", toy_gguf, *flags).mistake()


@pytest.mark.parametrize("job", JOBS)
def test_the_variable_device_is_refused_as_the_flag_is(job, toy_gguf, glm, monkeypatch):
    monkeypatch.setenv("DEVICE", "cuda")
    assert "leave --device and DEVICE out" in glm(*JOBS[job], "--model", toy_gguf).mistake()


def test_a_file_that_is_as_recorded_is_verified_and_answers(recorded):
    chat = load_chat(recorded, device="cpu", verify=True)
    try:
        assert chat.chat("你好", temperature=0, max_new_tokens=2)[1]
    finally:
        chat.engine.close()


@pytest.mark.parametrize("job", JOBS)
def test_verify_finds_other_contents_of_a_file_before_it_is_loaded(job, damaged):
    command = [sys.executable, "-m", "entrypoints", *map(str, JOBS[job]), "--model", str(damaged), "--verify"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert f"glm: {damaged} has other contents than when it was made" in done.stderr
    assert "slots of" not in done.stderr  # what is logged as llama.cpp starts


def test_without_verify_the_record_is_not_read(damaged):
    loading.check("llamacpp", damaged, {})
    loading.load("llamacpp", damaged, {}).close()


@pytest.mark.parametrize("job", [*JOBS, "doctor"])
@pytest.mark.parametrize("by", ["flag", "variable"])
def test_without_torch_a_folder_is_one_line_with_the_remedy(job, by, toy_native, monkeypatch):
    monkeypatch.setenv("MODEL_PATH", str(toy_native))
    words = [*map(str, JOBS.get(job, (job,))), *(["--model", str(toy_native)] if by == "flag" else [])]
    done = _without("torch,transformers", *words)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == "glm: this needs the packages torch, transformers; pip install 'glm-entrypoints[transformers]'"


@pytest.mark.parametrize("job", ["chat", "doctor"])
def test_without_torch_a_gguf_file_does_all_the_same(job, toy_gguf):
    done = _without("torch,transformers,safetensors", *map(str, JOBS.get(job, (job,))), "--model", str(toy_gguf))
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_without_llama_cpp_a_gguf_file_is_one_line_with_the_remedy(toy_gguf):
    done = _without("xllamacpp", "doctor", "--model", str(toy_gguf))
    assert done.returncode == 1
    assert done.stderr == "glm: this needs the package xllamacpp; pip install 'glm-entrypoints[quantized]'\n"


def _without(packages: str, *words: str) -> subprocess.CompletedProcess:
    """Run a job in a process in which some packages are not installed."""
    command = [sys.executable, "-c", WITHOUT, packages, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
