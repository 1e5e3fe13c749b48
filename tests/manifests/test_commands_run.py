"""The commands and variables of the containers, run as local processes with other mount paths.

Training runs on CPUs in two network namespaces, with the variables that an Indexed Job sets in its pods.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from manifests import arguments, container, environment, objects, one, pod_template
from processes import SETTING_NAMES, free_port
from serving_process import GLM, Server, serving

pytestmark = pytest.mark.timeout(900)
MOUNTS = ("/models", "/data", "/outputs", "/run/secrets")


@pytest.fixture
def here(tmp_path) -> Callable[[str], str]:
    """Translate a path in a container into a path on this machine."""

    def translate(text: str) -> str:
        for mount in MOUNTS:
            text = re.sub(rf"^{mount}(?=/|$)", f"{tmp_path}{mount}", text)
        return text

    for mount in MOUNTS:
        (tmp_path / mount[1:]).mkdir(parents=True)
    return translate


def rendered(overlay: str, kind: str, name: str, inner: str | None = None, **changed: str) -> tuple[list[str], dict]:
    """Arguments and variables of a container; `changed` overrides variables."""
    each = container(pod_template(one(objects(overlay), kind, name)), inner or name)
    each = {
        **each,
        "env": [
            {"name": entry["name"], "value": changed.get(entry["name"], entry.get("value"))} for entry in each["env"]
        ],
    }
    return arguments(each), environment(each)


def clean(variables: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in SETTING_NAMES}
    return kept | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} | variables


class TestTheModelInit:
    """The Deployment model-init: copies, quantizes and verifies."""

    def command(self, here, overlay="demo", name="model-init", kind="Deployment", **changed) -> tuple[list[str], dict]:
        args, variables = rendered(overlay, kind, name, **changed)
        return [*GLM, *map(here, args)], clean(variables)

    def test_it_fills_the_store_survives_a_kill_and_rejects_a_wrong_hash(self, here, toy_native):
        """The source is a local folder instead of a hub."""
        source = Path(here("/data")) / "tiny"
        shutil.copytree(toy_native, source)
        store = Path(here("/models"))
        command, variables = self.command(here, MODEL_SOURCE=f"{source}")
        killed = subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while (
            not [file for file in store.rglob("*") if file.is_file() and file.stat().st_size] and killed.poll() is None
        ):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        killed.kill()
        killed.communicate()
        assert killed.returncode == -signal.SIGKILL
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [f"{store / 'tiny'}", f"{store / 'tiny-q4_0.gguf'}"]
        assert not [file.name for file in store.iterdir() if not file.name.startswith((".", "tiny"))]
        self.verify_as_init_container(here, "tiny", 0)
        with (store / "tiny-q4_0.gguf").open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"\0" if stream.read(1) != b"\0" else b"\1")
        again = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200)
        assert again.returncode == 1
        assert again.stderr.splitlines()[-1].startswith("glm: ")
        assert "does not match its SHA-256" in again.stderr.splitlines()[-1]
        self.verify_as_init_container(here, "tiny", 1)

    def verify_as_init_container(self, here, model: str, code: int) -> None:
        """The init container of the server's pod."""
        args, variables = rendered("demo", "Deployment", "api", "verify-model", MODEL=model)
        done = subprocess.run(
            [*GLM, *map(here, args)], env=clean(variables), capture_output=True, text=True, timeout=100
        )
        assert done.returncode == code, done.stderr

    def test_an_empty_source_is_rejected_with_one_line(self, here):
        command, variables = self.command(here, MODEL_SOURCE="")
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=100)
        assert done.returncode == 1
        assert [line for line in done.stderr.splitlines() if line.startswith("glm: ")] == [done.stderr.splitlines()[-1]]


def test_the_serve_command_becomes_ready_answers_with_its_key_and_drains(here, toy_gguf, tmp_path):
    """The command of serve-quantized, on another port."""
    shutil.copy(toy_gguf, Path(here("/models")) / "tiny-q4_0.gguf")
    key = "sk-test"
    keys = Path(here("/run/secrets")) / "api-keys"
    keys.write_text(f"tester {hashlib.sha256(key.encode()).hexdigest()}\n")
    args, variables = rendered("serve-quantized", "Deployment", "api", MODEL="tiny")
    variables = {name: here(value) for name, value in variables.items()}
    args[args.index("--port") + 1] = f"{free_port()}"
    args[args.index("--host") + 1] = "127.0.0.1"
    with serving([*GLM, *args], tmp_path / "log", variables) as server:
        check_server(server, key)


def test_the_command_of_the_embeddings_answers_with_its_key_and_needs_no_chat_model(
    here, used, embedding_model, tmp_path
):
    shutil.copy(embedding_model.file, Path(here("/data")) / "bge.gguf")
    (Path(here("/run/secrets")) / "api-keys").write_text(f"tester {hashlib.sha256(b'sk-test').hexdigest()}\n")
    each = container(pod_template(one(used("embeddings"), "Deployment", "embeddings")), "api")
    args = [here(argument) for argument in arguments(each)]
    variables = {name: here(value) for name, value in environment(each).items()}
    args[args.index("--port") + 1] = f"{free_port()}"
    with serving([*GLM, *args], tmp_path / "log", clean(variables)) as server:
        server.wait_for("listening on")
        server.wait_ready()
        assert server.request("POST", "/v1/embeddings", {"input": "北京天气"})[0] == 401
        headers = {"authorization": "Bearer sk-test"}
        reply = server.post("/v1/embeddings", {"input": "北京天气"}, headers)
        assert (reply["model"], len(reply["data"][0]["embedding"])) == ("bge", 64)
        server.signal(signal.SIGTERM)
        assert server.wait(60) == 0


def check_server(server: Server, key: str) -> None:
    """Wait until ready, query with and without the key, and send SIGTERM during a streamed response."""
    deadline = time.monotonic() + 120
    while "listening on http://127.0.0.1:" not in server.log:
        assert server.process.poll() is None, server.log
        assert time.monotonic() < deadline, server.log
        time.sleep(0.05)
    port = int(re.search(r"listening on http://127\.0\.0\.1:(\d+)", server.log)[1])
    assert port == server.port
    server.wait_ready()
    body = {"messages": [{"role": "user", "content": "你好"}], "max_tokens": 400, "temperature": 0}
    headers = {"authorization": f"Bearer {key}"}
    assert server.request("POST", "/v1/chat/completions", body)[0] == 401
    models = json.loads(server.request("GET", "/v1/models", headers=headers)[2])
    assert [model["id"] for model in models["data"]] == ["tiny"]
    with server.stream("/v1/chat/completions", {**body, "stream": True}, headers) as answer:
        assert answer.readline().startswith(b"data: ")
        server.signal(signal.SIGTERM)
        assert b"[DONE]" in answer.read()
    assert server.wait(60) == 0


@pytest.fixture
def two_machines() -> Iterator[list[str]]:
    """Names of two connected network namespaces."""
    names = [f"glm-{os.getpid()}-{number}" for number in range(2)]
    made = (
        subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True) if shutil.which("ip") else None
    )
    if made is None or made.returncode:
        reason = "network namespaces need iproute2 and root"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    try:
        ends = [f"v{os.getpid()}-{number}" for number in range(2)]
        run = lambda *words: subprocess.run(["ip", *words], check=True, capture_output=True)  # noqa: E731
        run("netns", "add", names[1])
        run("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True)):
            run("link", "set", end, "netns", name)
            run("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", end)
            run("-n", name, "link", "set", end, "up")
            run("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_the_train_command_runs_on_two_nodes_and_resumes_after_one_fails(two_machines, here, toy_native, sample_rows):
    """The arguments of train-multi, with CPUs instead of GPUs and a tiny model."""
    shutil.copytree(toy_native, Path(here("/models")) / "tiny")
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sample_rows[:32])
    (Path(here("/data")) / "train.jsonl").write_text(rows, encoding="utf-8")
    args, variables = rendered("train-multi", "CronJob", "train", MODEL="tiny", RUN="first", MASTER_ADDR="10.77.0.1")
    args = [here(argument) for argument in args]
    position = args.index("--num-gpus")
    args[position : position + 2] = ["--num-processes", "1", "--device", "cpu"]
    args = [argument for argument in args if argument not in ("--bf16", "--gradient-checkpointing")]
    args[args.index("--save-steps") + 1] = "2"
    variables = clean({name: here(value) for name, value in variables.items()})
    assert (variables["NNODES"], args[args.index("--deepspeed") + 1]) == ("2", "zero2")

    def start(steps: int) -> list[subprocess.Popen]:
        command = [
            *GLM,
            *args,
            "--max-steps",
            f"{steps}",
            "--per-device-train-batch-size",
            "2",
            "--learning-rate",
            "1e-3",
        ]
        return [
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command],
                env=variables | {"JOB_COMPLETION_INDEX": f"{number}", "GLOO_SOCKET_IFNAME": f"v{os.getpid()}-{number}"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number, name in enumerate(two_machines)
        ]

    output = Path(here("/outputs")) / "first"
    machines = start(4000)
    try:
        wait_for(output / "checkpoint-2" / "checkpoint.json", machines)
        kill_all(two_machines[1])
        machines[1].communicate(timeout=60)
        _, errors = machines[0].communicate(timeout=240)
        assert machines[0].returncode == 1, errors
        assert len([line for line in errors.splitlines() if line.startswith("glm: ")]) == 1
        kept = newest(output)
        machines = start(kept + 2)
        ends = [machine.communicate(timeout=280) for machine in machines]
        assert [machine.returncode for machine in machines] == [0, 0], ends
        assert [out for out, _ in ends] == [f"{output}\n", ""]
        assert json.loads((output / "trainer_state.json").read_text())["global_step"] == kept + 2
    finally:
        for name in two_machines:
            kill_all(name)
        for machine in machines:
            machine.communicate(timeout=60)


def kill_all(namespace: str) -> None:
    """Kill all processes in a network namespace, as the failure of a node does."""
    found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True)
    for number in found.stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(number), signal.SIGKILL)


def newest(output: Path) -> int:
    return max(int(folder.parent.name.partition("-")[2]) for folder in output.glob("checkpoint-*/checkpoint.json"))


def wait_for(file: Path, machines: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 250
    while not file.exists():
        ended = [machine for machine in machines if machine.poll() is not None]
        assert not ended, [machine.communicate() for machine in ended]
        assert time.monotonic() < deadline, f"{file} was not written"
        time.sleep(0.05)


def test_missing_or_invalid_rows_stop_a_run_before_it_starts_and_its_flags_say_how_they_are_read(here):
    """check-run exits with 1, which fails the Job at once. It has the flags of the run, also those of a patch."""
    args, variables = rendered("train-multi", "CronJob", "train", "check-run", MODEL="absent", RUN="first")
    named = ["--prompt-column", "other", "--encoding", "gb18030"]
    unread = '{"other": "衣服", "summary": "好看"}\n'
    for content, flags, problem in (
        (None, [], "train.jsonl"),
        (unread, [], "train.jsonl"),
        (unread, named, "absent"),  # the rows are read, and then the model is missed
    ):
        if content:
            (Path(here("/data")) / "train.jsonl").write_text(content, encoding="gb18030")
        command = [sys.executable, "-m", "entrypoints", *map(here, [*args, *flags])]
        variables = clean({name: here(value) for name, value in variables.items()})
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=100)
        assert done.returncode == 1, done.stderr
        assert re.match(rf"glm: .*{problem}", done.stderr.splitlines()[-1]), done.stderr
