"""What `glm serve` and `glm chat` reject before they load a model: flags, addresses, missing packages."""

import argparse
import hashlib
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from entrypoints import flags
from entrypoints.__main__ import parse_arguments
from entrypoints.api.auth import KeyRing
from entrypoints.api.openai_schema import ChatRequest
from entrypoints.api.warm_up import WarmPrompt, _warm_up
from entrypoints.chat_session import load_chat
from entrypoints.checkpoint.gguf_reader import open_gguf
from entrypoints.engines import loading
from entrypoints.engines.llamacpp.server import _parameters
from entrypoints.engines.options import EngineOptions
from entrypoints.jobs.serve import _server_options

JOBS = {"chat": ("chat", "--prompt", "你好", "--max-new-tokens", 2), "serve": ("serve", "--port", 0)}
WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1].split(",")))  # as if they were not installed
from entrypoints.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def recorded(toy_gguf, tmp_path) -> Path:
    """A GGUF file with the record that glm quantize writes."""
    file = Path(shutil.copy(toy_gguf, tmp_path))
    fields = {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    file.with_name(f"{file.name}.json").write_text(json.dumps(fields))
    return file


@pytest.fixture
def damaged(recorded) -> Path:
    """The same with a changed last byte, which loading would not detect."""
    with recorded.open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)[0]
        stream.seek(-1, 2)
        stream.write(bytes([last ^ 1]))
    return recorded


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "localhost.example"])
def test_without_keys_serve_accepts_only_loopback_addresses(host, toy_native, glm):
    line = glm("serve", "--model", toy_native, "--host", host).mistake()
    assert f"--host {host} would serve the network without API keys" in line
    assert "--insecure-no-auth" in line


def test_a_port_in_use_is_a_user_error(toy_native, glm):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = glm("serve", "--model", toy_native, "--port", port).mistake()
    assert f"cannot listen on 127.0.0.1:{port}" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--slots", "0", "--queue", "-1"], "--slots 0, --queue -1"),
        (["--drain-seconds", "-1"], "--drain-seconds is 0 to"),
        (["--max-body-bytes", "0"], "--max-body-bytes is 1 to"),
        (["--port", "-1"], "--port is 0 to 65535"),
        (["--port", "70000"], "--port is 0 to 65535"),
        (["--adapter", "ads"], "--adapter ads is not of the form NAME=DIR"),
        (["--adapter", "a=x", "--adapter", "a=y"], "is already in use"),
        (["--adapter", "toy=x", "--served-model-name", "toy"], "is already in use"),
        (["--api-keys-file", "/nowhere"], "cannot read the key file /nowhere"),
    ],
)
def test_invalid_flags_are_rejected(flags, message, toy_native, glm):
    assert message in glm("serve", "--model", toy_native, *flags).mistake()


def test_an_invalid_model_is_rejected_before_loading(tmp_path, glm):
    assert "config.json" in glm("serve", "--model", tmp_path).mistake()
    assert "folder not found" in glm("serve", "--model", tmp_path / "none").mistake()


def test_a_missing_model_is_reported_with_the_remedy(glm):
    assert "set MODEL_PATH" in glm("serve").mistake()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter", "a=x"], "--adapter needs a chat model; add --model DIR, or omit it"),
        (["--engine", "vllm"], "--engine needs a chat model"),
        (["--slots", "2"], "--slots needs a chat model"),
        (["--verify"], "--verify needs a chat model"),
        (["--prefix-cache-gb", "2"], "--prefix-cache-gb needs a chat model"),
    ],
)
def test_flags_of_a_chat_model_are_rejected_when_only_embeddings_are_served(flags, message, embedding_model, glm):
    assert message in glm("serve", "--embeddings", embedding_model.file, *flags).mistake()


def test_an_invalid_embedding_model_is_rejected_before_loading(toy_gguf, embedding_model, tmp_path, glm):
    def mistake(*flags):
        return glm("serve", "--model", toy_gguf, *flags).mistake()

    assert "declares no pooling to a vector; give the GGUF file of an embedding model" in mistake(
        "--embeddings", toy_gguf, "--served-embeddings-name", "x"
    )
    assert "file not found" in mistake("--embeddings", tmp_path / "absent.gguf")
    taken = mistake("--embeddings", embedding_model.file, "--served-embeddings-name", "toy")
    assert "the name toy is already in use; choose a --served-embeddings-name" in taken
    assert "--served-embeddings-name needs an embedding model" in mistake("--served-embeddings-name", "x")


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dtype", "float16"), "--dtype float16 is not supported for a GGUF file; omit it"),
        (("--device", "cuda"), "--device cuda is not supported for a GGUF file; llama.cpp runs on the CPU"),
        (("--device", "mps"), "--device mps is not supported for a GGUF file; llama.cpp runs on the CPU"),
        (("--verify",), "toy.gguf.json is not in the same folder; copy the record too, or create the file with glm"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_flag_that_a_gguf_file_does_not_support_is_rejected(job, flags, message, toy_gguf, glm):
    assert message in glm(*JOBS[job], "--model", toy_gguf, *flags).mistake()


@pytest.mark.parametrize("job", JOBS)
def test_the_variable_device_is_rejected_like_the_flag(job, toy_gguf, glm, monkeypatch):
    monkeypatch.setenv("DEVICE", "cuda")
    assert "omit --device and DEVICE" in glm(*JOBS[job], "--model", toy_gguf).mistake()


def test_a_file_that_matches_its_record_is_verified_and_answers(recorded):
    chat = load_chat(recorded, EngineOptions(device="cpu", verify=True))
    try:
        assert chat.chat("你好", temperature=0, max_new_tokens=2)[1]
    finally:
        chat.engine.close()


def test_a_prefix_cache_needs_the_record_of_the_model(toy_gguf, glm, tmp_path):
    line = glm("serve", "--model", toy_gguf, "--prefix-cache", tmp_path).mistake()
    assert "--prefix-cache needs the hash record" in line
    assert "copy the record too, or create the file with glm quantize, which writes it, or omit --prefix-cache" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "contains no prompt"),
        ('{"messages": [{"role": "system", "content": "a"}]}\n{', "warm.jsonl:2: body: "),
        ('\n{"messages": []}', "warm.jsonl:2: messages"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "warm.jsonl:1: messages.0"),
        ('{"prompt": "a"}', "warm.jsonl:1: "),
        ("[1]", "warm.jsonl:1: "),
        ("\ud800".encode("utf-8", "surrogatepass"), "warm.jsonl:1: body: the body is not UTF-8"),
    ],
)
def test_an_error_in_the_file_of_warm_names_its_line(content, message, recorded, glm, tmp_path):
    file = tmp_path / "warm.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in glm("serve", "--model", recorded, "--warm", file, "--port", 0).mistake()


def test_more_prompts_to_warm_than_slots_are_reported(recorded, caplog, tmp_path):
    asked = WarmPrompt("place", ChatRequest(messages=[{"role": "user", "content": "hi"}]))
    for folder, count, reported in ((None, 2, False), (None, 3, True), (tmp_path / "cache", 3, False)):
        caplog.clear()
        engine = loading.load_engine(recorded, EngineOptions(slots=2, threads=1, prefix_cache=folder))
        _warm_up(engine, [asked] * count)
        engine.close()
        message = "--warm has 3 prompts, but without --prefix-cache each of the 2 slots holds one"
        assert (message in caplog.text) == reported


def test_a_limit_of_a_prefix_cache_that_is_not_there_is_rejected(recorded, glm):
    line = glm("serve", "--model", recorded, "--prefix-cache-gb", 2).mistake()
    assert "--prefix-cache-gb limits the folder of --prefix-cache; add --prefix-cache DIR, or omit it" in line


def test_more_slots_than_llama_cpp_has_are_rejected_before_the_model_is_read(recorded, glm):
    line = glm("serve", "--model", recorded, "--slots", 257, "--context-length", 256).mistake()
    assert "--slots 257: llama.cpp has at most 256; use fewer" in line
    engine = loading.load_engine(recorded, EngineOptions(slots=256, context_length=256, threads=1))
    engine.close()


def test_an_origin_is_compared_without_the_slash_that_an_address_bar_adds():
    args = parse_arguments(["serve", "--cors-origin", "https://chat.example/", "--cors-origin", "*"])[1]
    assert _server_options(args, "toy", None, KeyRing(), 1).cors_origins == ("https://chat.example", "*")


def test_threads_are_those_of_the_flag(recorded, glm):
    assert "out of bounds: --threads 0" in glm("serve", "--model", recorded, "--threads", 0).mistake()
    parser = argparse.ArgumentParser()
    flags.add_gguf_flags(parser)
    options = EngineOptions(**flags.gguf_options(parser.parse_args(["--threads", "1"])))
    assert _parameters(open_gguf(recorded), options).cpuparams.n_threads == 1


def test_device_cpu_keeps_a_build_with_gpu_support_off_the_gpu(toy_gguf):
    checkpoint = open_gguf(toy_gguf)
    layers = {device: _parameters(checkpoint, EngineOptions(device=device)).n_gpu_layers for device in ("auto", "cpu")}
    assert layers["cpu"] == 0
    assert layers["auto"] != 0


@pytest.mark.parametrize("flag", ["--warm", "--prefix-cache"])
def test_a_folder_does_not_support_the_flags_for_computed_prompts(flag, toy_native, glm, tmp_path):
    line = glm("serve", "--model", toy_native, flag, tmp_path, "--port", 0).mistake()
    assert f"{flag} is not supported by the engine transformers; omit it, or use a GGUF file" in line


@pytest.mark.parametrize("job", JOBS)
def test_verify_detects_changed_contents_before_loading(job, damaged):
    command = [sys.executable, "-m", "entrypoints", *map(str, JOBS[job]), "--model", str(damaged), "--verify"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert f"glm: {damaged} does not match its SHA-256" in done.stderr
    assert "with --slots" not in done.stderr  # logged when llama.cpp starts


def test_without_verify_the_record_is_not_read(damaged):
    loading.check_engine_options(damaged, EngineOptions())
    loading.load_engine(damaged, EngineOptions()).close()


@pytest.mark.parametrize("job", [*JOBS, "doctor"])
@pytest.mark.parametrize("by", ["flag", "variable"])
def test_without_torch_a_folder_is_rejected_with_the_remedy(job, by, toy_native, monkeypatch):
    monkeypatch.setenv("MODEL_PATH", str(toy_native))
    words = [*map(str, JOBS.get(job, (job,))), *(["--model", str(toy_native)] if by == "flag" else [])]
    done = _without("torch,transformers", *words)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == "glm: this needs the packages torch, transformers; pip install 'glm-entrypoints[transformers]'"


@pytest.mark.parametrize("job", ["chat", "doctor"])
def test_without_torch_a_gguf_file_works(job, toy_gguf):
    done = _without("torch,transformers,safetensors", *map(str, JOBS.get(job, (job,))), "--model", str(toy_gguf))
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_without_llama_cpp_a_gguf_file_is_rejected_with_the_remedy(toy_gguf):
    done = _without("xllamacpp", "doctor", "--model", str(toy_gguf))
    assert done.returncode == 1
    assert done.stderr == "glm: this needs the package xllamacpp; pip install 'glm-entrypoints[quantized]'\n"


def test_without_any_extra_serve_names_the_one_that_it_needs(toy_gguf):
    done = _without("numpy,xllamacpp,gguf,torch,transformers", "serve", "--model", str(toy_gguf))
    assert done.returncode == 1
    assert done.stderr == "glm: this needs the packages gguf, xllamacpp; pip install 'glm-entrypoints[quantized]'\n"


def _without(packages: str, *words: str) -> subprocess.CompletedProcess:
    """Run a command in a process in which some packages are not installed."""
    command = [sys.executable, "-c", WITHOUT, packages, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
