"""The images at work, confined as the manifests confine them. Traps J3, J5 and J6."""

import json
import re
import subprocess
import time

import pytest
from containers import CONFINED, IMAGES, image_of, wait_until

from entrypoints.engines.llamacpp_build import NEWER
from entrypoints.engines.machine import processor_flags

SERVERS = [
    ("infer-quantized", "toy-q4_0.gguf", ()),
    ("infer-cpu", "toy", ()),
    ("infer-cpu", "toy-q4_0.gguf", ()),
    ("infer-cuda", "toy", ("--engine", "transformers")),
    ("infer-cuda", "toy", ("--engine", "vllm")),
]
ASK = """
import json, urllib.request
body = json.dumps({"messages": [{"role": "user", "content": "你好"}], "max_tokens": 4}).encode()
headers = {"content-type": "application/json", "authorization": "Bearer sesame"}
request = urllib.request.Request("http://127.0.0.1:8000/v1/chat/completions", body, headers)
print(urllib.request.urlopen(request, timeout=120).read().decode())
"""
WRITE = """
import getpass, os, pathlib, tempfile
pathlib.Path.home().joinpath("x").write_text("")
tempfile.NamedTemporaryFile()
for folder in ("/", "/app", "/venv", "/models", "/outputs"):
    try:
        pathlib.Path(folder, "x").write_text("")
    except OSError as error:
        print(folder, error.errno)
print(getpass.getuser(), os.getuid())
"""
READ_ONLY = 30  # errno EROFS


def health(container):
    container.reload()
    return container.attrs["State"]["Health"]["Status"]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "model", "flags"), SERVERS)
def test_a_server_without_network_turns_healthy_answers_and_ends_on_sigterm(name, model, flags, models, start):
    words = ("serve", "--host", "0.0.0.0", "--model", f"/models/{model}", *flags)
    mounts = {str(models): {"bind": "/models", "mode": "ro"}}
    container = start(name, *words, volumes=mounts, environment={"API_KEY": "sesame"}, shm_size="1g", **CONFINED)
    wait_until(lambda: health(container) == "healthy", 900, lambda: container.logs().decode())
    code, said = container.exec_run(["python", "-c", ASK])
    assert code == 0, said.decode()
    assert json.loads(said)["choices"][0]["message"]["role"] == "assistant"
    begun = time.monotonic()
    container.stop(timeout=60)
    assert time.monotonic() - begun < 50  # it ended by itself, not by SIGKILL after the 60 s
    container.reload()
    assert container.attrs["State"]["ExitCode"] == 0
    log = container.logs().decode()
    assert [line for line in log.splitlines() if re.search(r"WARN|ERROR|CRITICAL|Traceback", line)] == []
    assert "sesame" not in log


@pytest.mark.parametrize("name", IMAGES)
def test_any_user_may_write_to_the_declared_places_and_nowhere_else(name, finish):
    code, said = finish(name, "-c", WRITE, entrypoint="python", **CONFINED)
    assert code == 0, said
    lines = said.splitlines()
    assert lines[:-1] == [f"{folder} {READ_ONLY}" for folder in ("/", "/app", "/venv", "/models", "/outputs")]
    assert lines[-1] == "glm 12345"


@pytest.mark.parametrize("name", IMAGES)
def test_the_doctor_runs_inside(name, finish):
    code, said = finish(name, "doctor", **CONFINED)
    assert code == 0, said
    assert re.search(r"^python +3\.11\.", said, re.MULTILINE)
    assert ("torch            missing" in said) == (name == "infer-quantized")


@pytest.mark.parametrize("name", ["infer-cpu", "infer-quantized"])
def test_the_label_tells_which_build_of_llama_cpp_is_inside(name, engine, finish):
    """Compiled for this machine it leaves nothing of its processor unused."""
    build = image_of(engine, name).labels["glm.llamacpp-cpu"]
    _, said = finish(name, "doctor", **CONFINED)
    line = r"^llama\.cpp +(?:all GGUF types of glm quantize|runs GGUF files; .+?)(; faster with .+)?$"
    faster = re.search(line, said, re.MULTILINE)[1]
    assert bool(faster) == bool(build == "published" and processor_flags() & set(NEWER.values()))
    assert build in ("published", "native"), "built for another processor than this one's"


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize(
    ("words", "variables", "told"),
    [
        (("serve", "--host", "0.0.0.0"), {"LOG_FORMAT": "xml"}, "LOG_FORMAT=xml"),
        (("serve",), {}, "set MODEL_PATH"),
        (("serve", "--model", "/models/none"), {}, "/models/none"),
        (("serve", "--host", "0.0.0.0", "--model", "/models/toy"), {}, "--insecure-no-auth"),
    ],
    ids=["setting", "no-model", "wrong-model", "no-key"],
)
def test_a_mistake_is_one_line_and_exit_code_1(name, words, variables, told, models, finish):
    mounts = {str(models): {"bind": "/models", "mode": "ro"}}
    if name == "infer-quantized":  # it has llama.cpp alone, so the model is a file
        words = [f"{word}.gguf" if word.startswith("/models/") else word for word in words]
    code, said = finish(name, *words, environment=variables, volumes=mounts, **CONFINED)
    assert code == 1, said
    assert len(said.splitlines()) == 1
    assert said.startswith("glm: ")
    assert told in said


@pytest.fixture
def rows(tmp_path, sample_rows):
    """The bundled ad copy, for a container."""
    folder = tmp_path / "data"
    folder.mkdir()
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in sample_rows)
    (folder / "train.jsonl").write_text(text, encoding="utf-8")
    subprocess.run(["chmod", "-R", "a+rX", tmp_path], check=True)
    return folder


def training(models, rows, outputs, *more):
    """Words and mounts of a small run."""
    words = ("train", "--model-name-or-path", "/models/toy", "--train-file", "/data/train.jsonl")
    words += ("--prompt-column", "content", "--response-column", "summary", "--output-dir", "/outputs/run", *more)
    mounts = {
        str(models): {"bind": "/models", "mode": "ro"},
        str(rows): {"bind": "/data", "mode": "ro"},
        str(outputs): {"bind": "/outputs", "mode": "rw"},
    }
    return words, {"volumes": mounts, **CONFINED}


@pytest.fixture
def outputs(tmp_path):
    folder = tmp_path / "outputs"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["train-cuda", "infer-cpu"])
def test_a_small_run_trains_and_writes_a_whole_checkpoint(name, models, rows, outputs, finish):
    words, options = training(models, rows, outputs, "--max-steps", "2", "--per-device-train-batch-size", "2")
    code, said = finish(name, *words, seconds=600, **options)
    assert code == 0, said
    assert {"model.safetensors", "manifest.json"} <= {file.name for file in (outputs / "run").iterdir()}


@pytest.mark.timeout(900)
def test_two_processes_of_deepspeed_train_in_one_container(models, rows, outputs, finish):
    flags = ("--num-processes", "2", "--deepspeed", "zero2", "--max-steps", "2", "--per-device-train-batch-size", "2")
    words, options = training(models, rows, outputs, *flags)
    code, said = finish("train-cuda", *words, seconds=800, shm_size="1g", **options)
    assert code == 0, said
    assert (outputs / "run" / "model.safetensors").is_file()


@pytest.mark.timeout(900)
def test_docker_stop_saves_a_checkpoint_before_training_ends(models, rows, outputs, start):
    """J6."""
    words, options = training(models, rows, outputs, "--max-steps", "100000", "--logging-steps", "1")
    container = start("train-cuda", *words, **options)
    wait_until(lambda: "loss" in container.logs().decode(), 400, lambda: container.logs().decode())
    container.stop(timeout=120)
    container.reload()
    assert container.attrs["State"]["ExitCode"] not in (0, 137), container.logs().decode()
    saved = list((outputs / "run").glob("checkpoint-*/model.safetensors"))
    assert len(saved) == 1


def test_a_folder_that_cannot_be_written_to_is_one_line_before_anything_slow(models, rows, outputs, finish):
    outputs.chmod(0o555)
    words, options = training(models, rows, outputs)
    code, said = finish("train-cuda", *words, **options)
    assert code == 1, said
    assert said.splitlines()[-1].startswith("glm: ")
    assert "/outputs/run" in said.splitlines()[-1]
    assert "Traceback" not in said


def test_shared_memory_too_small_for_many_processes_is_told_with_the_flag(models, rows, outputs, finish):
    """J3."""
    words, options = training(models, rows, outputs, "--num-processes", "8")
    code, said = finish("train-cuda", *words, shm_size="1m", **options)
    assert code == 1, said
    assert "--shm-size" in said
