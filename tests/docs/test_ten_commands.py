"""The ten commands of README.md, run as they are written there, in an empty folder with a tiny model as the 6B.

Two are replaced: `make venv`, since this environment exists, and `glm download`, since the test has no network: the
original layout of the tiny model is in the place where the download would be. The server listens on a free port.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
HEADING = "## From download to answers in ten commands"


def ten_commands() -> list[str]:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8").split(HEADING)[1]
    block = re.search(r"```console\n(.*?)```", text, re.S)[1]
    return [line.removeprefix("$ ") for line in re.split(r"\n(?=\$ )", block.strip())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, toy_original: Path, sample_rows: list[dict]) -> Path:
    folder = tmp_path_factory.mktemp("ten")
    shutil.copytree(toy_original, folder / "models" / "chatglm3-6b-original")
    for name, rows in (("train", sample_rows[:40]), ("dev", sample_rows[40:50])):
        lines = [json.dumps({key: row[key] for key in ("content", "summary")}, ensure_ascii=False) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@contextlib.contextmanager
def in_background(command: str, folder: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(
            command, shell=True, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)


def wait_until_ready(process: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + 120
    probe = ["curl", "--silent", "--fail", f"http://127.0.0.1:{port}/readyz"]
    while subprocess.run(probe, capture_output=True, check=False).returncode:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


@pytest.mark.slow
def test_the_ten_commands_lead_from_a_download_to_an_answer(folder, environment):
    commands = ten_commands()
    assert len(commands) == 10
    assert commands[0].startswith("make venv")
    assert commands[1] == "glm download THUDM/chatglm3-6b"
    for command in commands[2:8]:
        done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (folder / "scores" / "predict_results.json").is_file()
    port = free_port()  # something else on this machine may listen on 8000
    with in_background(f"{commands[8]} --port {port}", folder, environment) as server:
        wait_until_ready(server, port, folder / "serve.log")
        query = commands[9].replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        answer = subprocess.run(query, shell=True, capture_output=True, text=True, check=True).stdout
    message = json.loads(answer)["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert isinstance(message["content"], str)
