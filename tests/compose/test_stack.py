"""The default stack: API, both pages, an API key, and a complete removal."""

import io
import json
import re
import socket
import subprocess
from collections.abc import Callable, Iterator

import httpx
import openai
import pytest
from chat_drivers import DRIVERS
from containers import PROBE, check_restrictions

from compose import Project
from entrypoints.__main__ import main

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def stack(make_project: Callable[..., Project]) -> Iterator[Project]:
    """`docker compose up --wait` with the demo model."""
    project = make_project()
    project.compose("up", "--detach", "--wait", "--no-build", seconds=800)
    yield project
    project.remove()


def address(project: Project, port: str) -> str:
    return f"http://127.0.0.1:{project.environment[port]}"


def test_the_openai_client_gets_the_answer_of_the_demo_model(stack):
    with openai.OpenAI(base_url=f"{address(stack, 'API_PORT')}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["demo-q4_0"]
        messages = [{"role": "user", "content": "你好"}]
        answer = client.chat.completions.create(model="demo-q4_0", messages=messages, temperature=0)
        text = answer.choices[0].message.content
        assert "演示用的小模型" in text
        chunks = client.chat.completions.create(model="demo-q4_0", messages=messages, temperature=0, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text


@pytest.mark.parametrize(("ui", "port"), [("gradio", "WEB_PORT"), ("streamlit", "WEB_STREAMLIT_PORT")])
def test_a_user_of_a_page_gets_an_answer(stack, new_page, ui, port):
    chat = DRIVERS[ui](new_page(), address(stack, port)).open()
    chat.ask("你是谁", re.compile("小模型"))


def test_model_init_succeeds_and_a_second_run_only_verifies(stack):
    assert stack.exit_code("model-init") == 0
    again = stack.compose("run", "--rm", "model-init")
    assert again.stdout.split() == ["/models/demo", "/models/demo-q4_0.gguf"]
    assert "files match the manifest" in again.stderr
    assert "training" not in again.stderr


def test_the_api_exposes_metrics(stack):
    text = httpx.get(f"{address(stack, 'API_PORT')}/metrics").text
    assert re.search(r'glm_requests_total\{path="/v1/chat/completions",status="200"\} [1-9]', text)


def test_the_containers_cannot_write_outside_their_mounts(stack):
    for service in ("api", "web"):
        for folder in ("/", "/app", "/models", "/venv"):
            done = stack.compose("exec", service, "touch", f"{folder}/x", check=False)
            assert done.returncode != 0, (service, folder)
        assert stack.compose("exec", service, "id", "-u").stdout.strip() == "10001"


def test_every_running_container_has_no_capability_and_writes_to_its_mounts_only(stack):
    services = stack.config()["services"]
    running = stack.compose("ps", "--services", "--status", "running").stdout.split()
    assert {"api", "web"} <= set(running)
    for name in running:
        mounts = {mount["target"] for mount in services[name].get("volumes", []) if not mount.get("read_only")}
        memory = {entry.partition(":")[0] for entry in services[name]["tmpfs"]}
        check_restrictions(stack.compose("exec", name, "python", "-c", PROBE).stdout, mounts | memory)


def test_a_key_from_a_file_is_required_by_the_api_and_sent_by_the_pages(stack, tmp_path):
    (tmp_path / "key").write_text("glm-opensesame\n", encoding="utf-8")
    (tmp_path / "key").chmod(0o644)
    locked = Project(stack.name, stack.profiles, **{**stack.environment, "API_KEY_FILE": tmp_path / "key"})
    locked.compose("up", "--detach", "--wait", "--no-build", "api", "web-streamlit")
    models = f"{address(stack, 'API_PORT')}/v1/models"
    assert httpx.get(models).status_code == 401
    assert httpx.get(models, headers={"Authorization": "Bearer glm-opensesame"}).status_code == 200
    script = "from entrypoints.settings import Settings; import os; print(bool(Settings.from_env(os.environ).api_key))"
    assert locked.compose("exec", "web-streamlit", "python", "-c", script).stdout.strip() == "True"
    for service in ("api", "web-streamlit"):
        container = locked.compose("ps", "--quiet", service).stdout.strip()
        inspected = subprocess.run(["docker", "inspect", container], capture_output=True, text=True, check=True).stdout
        assert "opensesame" not in inspected


def test_the_documented_command_deletes_the_conversations_of_a_user_who_was_removed(stack, tmp_path, monkeypatch):
    users = tmp_path / "users.txt"
    monkeypatch.setattr("sys.stdin", io.StringIO("a password of ben\n"))
    assert main(["user", str(users), "ben"]) == 0
    users.chmod(0o644)
    given = {"PAGE_USERS_FILE": users, "CONVERSATIONS": "server"}
    project = Project(stack.name, stack.profiles, **{**stack.environment, **given})
    project.compose("up", "--detach", "--wait", "--no-build", "--no-deps", "web")
    script = (
        "from pathlib import Path; from entrypoints.web.conversation_database import ConversationDatabase;"
        "ConversationDatabase(Path('/pages')).write('anna', '1', '{}', None)"
    )
    project.compose("exec", "web", "python", "-c", script)
    deleted = project.compose("exec", "web", "glm", "user", "/run/secrets/page-users", "anna", "--delete")
    assert "with 1 stored conversations" in deleted.stderr


def test_a_port_that_is_already_in_use_is_reported(stack):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        other = Project(f"{stack.name}-taken", stack.profiles, **{**stack.environment, "API_PORT": port})
        try:
            done = other.compose("up", "--detach", "--no-build", "--no-deps", "api", check=False)
        finally:
            other.remove()
    assert done.returncode != 0
    assert re.search(rf"{port}.*(already in use|already allocated)", done.stderr)


def test_down_leaves_no_container_and_no_network(stack):
    stack.compose("down")
    listed = stack.compose("--profile", "*", "ps", "--all", "--format", "json").stdout
    assert [json.loads(line) for line in listed.splitlines()] == []
    label = f"label=com.docker.compose.project={stack.name}"
    for kind in ("container", "network"):
        command = ["docker", kind, "ls", *(["--all"] if kind == "container" else []), "--quiet", "--filter", label]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""
