"""The commands of the first week in compose/README.md, run in order on a copy of the repository with a tiny model."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from containers import REPOSITORY, VERSION

from compose import KEPT, Project, ports

pytestmark = pytest.mark.timeout(1800)
README = REPOSITORY / "compose" / "README.md"
COPIED = ("compose", "compose.yaml", "Makefile", ".env.example", "images", "entrypoints", "pyproject.toml")
NEXT = "0.2.0"
SETTINGS = {
    "MODEL": "base", "DATA_DIR": "./data", "TRAIN_FILE": "train.jsonl", "RUN": "mine",
    "TRAIN_ARGS": "--method lora --learning-rate 0.01 --max-steps 2 --max-target-length 32",
}  # fmt: skip


def commands() -> list[str]:
    """The command lines of the section, without comments."""
    section = README.read_text(encoding="utf-8").split("## The first week\n")[1].split("\n## ")[0]
    lines = section.split("```console\n")[1].split("```")[0].splitlines()
    return [re.sub(r"\s+# .*", "", line.removeprefix("$ ")) for line in lines]


class Week:
    """A copy of the repository with its own project, and the commands that were run in it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.ports = folder, name, ports()
        for entry in COPIED:
            source = REPOSITORY / entry
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / entry, ignore=ignored) if source.is_dir() else shutil.copy(source, folder)
        self.url = f"http://127.0.0.1:{self.ports['API_PORT']}"

    def run(self, command: str, answer: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if key in KEPT}
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env={**kept, "COMPOSE_PROJECT_NAME": self.name},
            input=answer, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr[-3000:]}"
        return done

    def edit(self, **settings: object) -> None:
        """Edit .env, as the comments of the commands say."""
        with (self.folder / ".env").open("a", encoding="utf-8") as stream:
            stream.writelines(f"{name}={value}\n" for name, value in settings.items())

    def model(self, key: str = "") -> str:
        """Name of the model that answers a question."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        with httpx.Client(base_url=self.url, headers=headers, timeout=60) as client:
            name = client.get("/v1/models").json()["data"][0]["id"]
            messages = [{"role": "user", "content": "你好"}]
            reply = client.post("/v1/chat/completions", json={"model": name, "messages": messages, "max_tokens": 2})
        assert reply.status_code == 200, reply.text
        return name

    def volumes(self) -> set[str]:
        listed = self.run(f"docker volume ls --quiet --filter label=com.docker.compose.project={self.name}").stdout
        return {line.removeprefix(f"{self.name}_") for line in listed.split()}


@pytest.fixture
def week(images, small_models, sample_rows, tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    found = Week(folder, f"glm-week-{os.getpid()}")
    shutil.copytree(small_models / "tiny", folder / "models" / "base")
    (folder / "data").mkdir()
    for name, rows in (("train", sample_rows[:16]), ("dev", sample_rows[16:20])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "data" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    folder.parent.chmod(0o755)
    yield found
    Project(found.name).remove()
    for image in ("infer-cpu", "infer-quantized"):
        subprocess.run(["docker", "image", "rm", f"glm-{image}:{NEXT}"], capture_output=True, check=False)


def test_the_first_week_as_documented(week, tmp_path):
    (copy, up, check, tune, compare, switch, anna, ben, mode, name_keys, restart, roll_back, backup, restore,
     next_version, upgrade, former_version, downgrade, remove) = commands()  # fmt: skip
    week.run(copy)
    week.edit(**week.ports, **SETTINGS)
    week.run(up)
    assert week.model() == "base-q4_0"
    assert "16 rows" in week.run(check).stdout
    assert "/outputs/mine" in week.run(tune).stdout
    table = week.run(compare).stdout
    assert re.search(r"^\| base \|.*\n\| mine \|", table, re.M)

    assert "to go back: make switch MODEL=base" in week.run(switch).stdout
    assert week.model() == "mine-q4_0"
    failed = week.run("make switch MODEL=mien", check=False)
    assert failed.returncode == 2
    assert "model 'mien' not found" in failed.stderr
    assert "switch: mien cannot be prepared (see above); mine is still served" in failed.stderr
    assert week.model() == "mine-q4_0"

    keys = [week.run(command).stdout.strip() for command in (anna, ben)]
    for command in (mode, name_keys, restart):
        week.run(command)
    assert [week.model(key) for key in keys] == ["mine-q4_0"] * 2
    assert {httpx.get(week.url + path).status_code for path in ("/v1/models", "/metrics")} == {401}
    assert httpx.get(f"{week.url}/metrics", headers={"authorization": f"Bearer {keys[0]}"}).status_code == 200
    sizes = week.run("docker compose exec -T api glm doctor").stdout
    assert len(re.findall(r"^volume +\d+\.\d [MGk]B in /(models|outputs|usage), .* free$", sizes, re.M)) == 3, sizes

    week.run(roll_back)
    assert week.model(keys[1]) == "base-q4_0"
    week.run(backup)
    before = week.run("docker compose exec -T api sh -c 'cat /usage/cpu/* && ls /outputs/*'").stdout
    assert {"anna", "ben"} <= {json.loads(line)["key"] for line in before.splitlines() if line.startswith("{")}
    assert "compared:" in before
    week.run(remove, answer="yes\n")
    assert week.volumes() == set()
    week.run(restore)
    week.run(up)
    assert week.model(keys[0]) == "base-q4_0"
    after = week.run("docker compose exec -T api sh -c 'cat /usage/cpu/* && ls /outputs/*'").stdout
    assert {*before.splitlines()} <= {*after.splitlines()}

    for image in ("infer-cpu", "infer-quantized"):  # in place of git pull and docker compose build
        week.run(f"docker tag glm-{image}:{VERSION} glm-{image}:{NEXT}")
    for change, start, version in ((next_version, upgrade, NEXT), (former_version, downgrade, VERSION)):
        week.run(change)
        week.run(start)
        used = week.run("docker compose ps --format '{{.Image}}'").stdout.split()
        assert {image.partition(":")[2] for image in used} == {version}
        assert len(used) == 3
        assert week.model(keys[0]) == "base-q4_0"
    assert week.run(remove, answer="no\n", check=False).returncode == 2
    assert week.volumes() >= {"models", "outputs", "usage"}
    week.run(remove, answer="yes\n")
    assert week.volumes() == set()
    assert week.run("docker compose ps --all --quiet").stdout == ""
