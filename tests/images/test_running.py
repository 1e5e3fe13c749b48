"""Containers of the images under the restrictions of the manifests: no network, read-only root, any user id."""

import json
import re
import subprocess
import time

import pytest
from containers import CONFINED, IMAGES, PROBE, check_restrictions, wait_until

from entrypoints.engines.llamacpp.cpu_features import VARIANTS
from entrypoints.hardware.resources import cpu_flags

SERVERS = [
    ("infer-quantized", "tiny-q4_0.gguf", ()),
    ("infer-cpu", "tiny", ()),
    ("infer-cpu", "tiny-q4_0.gguf", ()),
    ("infer-cuda", "tiny", ("--engine", "transformers")),
    ("infer-cuda", "tiny", ("--engine", "vllm")),
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
COMPARE = """
import json, pathlib, subprocess, sys
from entrypoints.engines.llamacpp import cpu_features
from entrypoints.engines.llamacpp.engine import LlamaCppEngine
from entrypoints.engines.options import EngineOptions

def computed(name):
    cpu_features.VARIANTS = {name: cpu_features.VARIANTS[name]} if name in cpu_features.VARIANTS else {}
    assert (cpu_features.load_cpu_code() or "published") == name
    engine = LlamaCppEngine.load(pathlib.Path("/models/tiny-q4_0.gguf"), EngineOptions(threads=2))
    first = engine.generate_greedy(list(range(100, 164)), 1, 100)[0]
    engine.close()
    return [logprob for _, logprob in first.top]

if len(sys.argv) > 1:
    print(json.dumps(computed(sys.argv[1])))
else:
    program, flags = sys.orig_argv[2], cpu_features.cpu_flags()
    names = ["published", *(name for name, needed in cpu_features.VARIANTS.items() if needed <= flags)]
    run = lambda name: subprocess.check_output([sys.executable, "-c", program, name])
    print(json.dumps({name: json.loads(run(name)) for name in names}))
"""
READ_ONLY = 30  # errno EROFS


def health(container):
    container.reload()
    return container.attrs["State"]["Health"]["Status"]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "model", "flags"), SERVERS)
def test_a_server_without_network_becomes_healthy_answers_and_exits_on_sigterm(name, model, flags, models, start):
    arguments = ("serve", "--host", "0.0.0.0", "--model", f"/models/{model}", *flags)
    mounts = {str(models): {"bind": "/models", "mode": "ro"}}
    container = start(name, *arguments, volumes=mounts, environment={"API_KEY": "sesame"}, shm_size="1g", **CONFINED)
    wait_until(lambda: health(container) == "healthy", 900, lambda: container.logs().decode())
    code, output = container.exec_run(["python", "-c", ASK])
    assert code == 0, output.decode()
    assert json.loads(output)["choices"][0]["message"]["role"] == "assistant"
    started = time.monotonic()
    container.stop(timeout=60)
    assert time.monotonic() - started < 50  # it exited by itself, before Docker sends SIGKILL after 60 s
    container.reload()
    assert container.attrs["State"]["ExitCode"] == 0
    log = container.logs().decode()
    assert [line for line in log.splitlines() if re.search(r"WARN|ERROR|CRITICAL|Traceback", line)] == []
    assert "sesame" not in log


@pytest.mark.parametrize("name", IMAGES)
def test_any_user_can_write_to_the_declared_folders_and_nowhere_else(name, finish):
    code, output = finish(name, "-c", WRITE, entrypoint="python", **CONFINED)
    assert code == 0, output
    lines = output.splitlines()
    assert lines[:-1] == [f"{folder} {READ_ONLY}" for folder in ("/", "/app", "/venv", "/models", "/outputs")]
    assert lines[-1] == "glm 12345"


@pytest.mark.parametrize("name", IMAGES)
def test_a_process_of_the_image_has_no_capability_and_gains_none(name, finish):
    code, output = finish(name, "-c", PROBE, entrypoint="python", **CONFINED)
    assert code == 0, output
    check_restrictions(output, {"/tmp", "/home/glm"})


@pytest.mark.parametrize("name", IMAGES)
def test_the_doctor_runs_inside(name, finish):
    code, output = finish(name, "doctor", **CONFINED)
    assert code == 0, output
    assert re.search(r"^python +3\.11\.", output, re.MULTILINE)
    assert ("torch            missing" in output) == (name == "infer-quantized")


@pytest.mark.parametrize("name", ["infer-cpu", "infer-quantized"])
def test_the_doctor_names_the_cpu_code_that_fits_this_cpu(name, finish):
    flags = cpu_flags()
    kinds = {
        "amx_int8": "sapphirerapids",
        "avx512_vnni": "cascadelake",
        "avx512vl": "skylakex",
        "avx_vnni": "alderlake",
    }
    expected = next((kind for flag, kind in kinds.items() if flag in flags), None)
    _, output = finish(name, "doctor", **CONFINED)
    line = re.search(
        r"^llama\.cpp +(?:all GGUF types of glm quantize|runs GGUF files; .+?)(; CPU code: .+)?$", output, re.M
    )
    assert line[1] == (f"; CPU code: {expected}" if expected else None)


def test_every_cpu_code_of_the_image_that_runs_here_computes_the_same(models, finish):
    mounts = {str(models): {"bind": "/models", "mode": "ro"}}
    code, output = finish("infer-quantized", "-c", COMPARE, entrypoint="python", volumes=mounts, **CONFINED)
    assert code == 0, output
    computed = json.loads(output.splitlines()[-1])
    assert set(computed) == {"published", *(name for name, needed in VARIANTS.items() if needed <= cpu_flags())}
    for name, logprobs in computed.items():
        assert logprobs == pytest.approx(computed["published"], abs=0.05), name


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (("serve", "--host", "0.0.0.0"), {"LOG_FORMAT": "xml"}, "LOG_FORMAT=xml"),
        (("serve",), {}, "set MODEL_PATH"),
        (("serve", "--model", "/models/none"), {}, "/models/none"),
        (("serve", "--host", "0.0.0.0", "--model", "/models/tiny"), {}, "--insecure-no-auth"),
    ],
    ids=["setting", "no-model", "wrong-model", "no-key"],
)
def test_a_user_error_is_one_line_and_exit_code_1(name, arguments, variables, message, models, finish):
    mounts = {str(models): {"bind": "/models", "mode": "ro"}}
    if name == "infer-quantized":  # only llama.cpp, so the model is a GGUF file
        arguments = [f"{each}.gguf" if each.startswith("/models/") else each for each in arguments]
    code, output = finish(name, *arguments, environment=variables, volumes=mounts, **CONFINED)
    assert code == 1, output
    assert len(output.splitlines()) == 1
    assert output.startswith("glm: ")
    assert message in output


@pytest.fixture
def rows(tmp_path, sample_rows):
    """The bundled training data, readable in a container."""
    folder = tmp_path / "data"
    folder.mkdir()
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in sample_rows)
    (folder / "train.jsonl").write_text(text, encoding="utf-8")
    subprocess.run(["chmod", "-R", "a+rX", tmp_path], check=True)
    return folder


def training(models, rows, outputs, *more):
    """Arguments and options of a small training run."""
    arguments = ("train", "--model-name-or-path", "/models/tiny", "--train-file", "/data/train.jsonl")
    arguments += ("--prompt-column", "content", "--response-column", "summary", "--output-dir", "/outputs/run", *more)
    mounts = {
        str(models): {"bind": "/models", "mode": "ro"},
        str(rows): {"bind": "/data", "mode": "ro"},
        str(outputs): {"bind": "/outputs", "mode": "rw"},
    }
    return arguments, {"volumes": mounts, **CONFINED}


@pytest.fixture
def outputs(tmp_path):
    folder = tmp_path / "outputs"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["train-cuda", "infer-cpu"])
def test_a_small_run_writes_a_complete_checkpoint(name, models, rows, outputs, finish):
    arguments, options = training(models, rows, outputs, "--max-steps", "2", "--per-device-train-batch-size", "2")
    code, output = finish(name, *arguments, seconds=600, **options)
    assert code == 0, output
    assert {"model.safetensors", "manifest.json"} <= {file.name for file in (outputs / "run").iterdir()}


@pytest.mark.timeout(900)
def test_two_processes_of_deepspeed_train_in_one_container(models, rows, outputs, finish):
    flags = ("--num-processes", "2", "--deepspeed", "zero2", "--max-steps", "2", "--per-device-train-batch-size", "2")
    arguments, options = training(models, rows, outputs, *flags)
    code, output = finish("train-cuda", *arguments, seconds=800, shm_size="1g", **options)
    assert code == 0, output
    assert (outputs / "run" / "model.safetensors").is_file()


@pytest.mark.timeout(900)
def test_docker_stop_saves_a_checkpoint_before_training_exits(models, rows, outputs, start):
    """Otherwise a stop would lose the work since the last checkpoint."""
    arguments, options = training(
        models, rows, outputs, "--max-steps", "100000", "--save-steps", "50000", "--logging-steps", "1"
    )
    container = start("train-cuda", *arguments, **options)
    wait_until(lambda: "loss" in container.logs().decode(), 400, lambda: container.logs().decode())
    container.stop(timeout=120)
    container.reload()
    assert container.attrs["State"]["ExitCode"] not in (0, 137), container.logs().decode()
    saved = list((outputs / "run").glob("checkpoint-*/model.safetensors"))
    assert len(saved) == 1


def test_an_output_folder_without_write_permission_is_one_line_before_training_starts(models, rows, outputs, finish):
    outputs.chmod(0o555)
    arguments, options = training(models, rows, outputs)
    code, output = finish("train-cuda", *arguments, **options)
    assert code == 1, output
    assert output.splitlines()[-1].startswith("glm: ")
    assert "/outputs/run" in output.splitlines()[-1]
    assert "Traceback" not in output


def test_too_little_shared_memory_is_reported_with_the_flag_that_raises_it(models, rows, outputs, finish):
    """Processes of one host communicate through shared memory, of which Docker gives 64 MB by default."""
    arguments, options = training(models, rows, outputs, "--num-processes", "8")
    code, output = finish("train-cuda", *arguments, shm_size="1m", **options)
    assert code == 1, output
    assert "--shm-size" in output
