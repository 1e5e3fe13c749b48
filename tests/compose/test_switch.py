"""compose/switch with a program in place of docker: what it calls when a model cannot be prepared or does not start."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from containers import REPOSITORY

# Keeps the served model in a file; knows the models base, mine, and heavy, which is prepared but does not start.
DOCKER = """#!/bin/bash
case "$*" in
  *'ps --services'*) cat services ;;
  *'ps --all --quiet'*) echo container ;;
  *glm.model*) cat served ;;
  *Health.Status*) [[ $(cat served) == heavy ]] && echo 'starting restarting 2' || echo 'healthy running 0' ;;
  *' run '*) echo "prepare $MODEL${FAMILY:+ of $FAMILY} with ${!#}" >>calls
    [[ $MODEL == base || $MODEL == mine || $MODEL == heavy ]] ;;
  *' up '*) echo "serve $MODEL as ${!#}" >>calls; echo "$MODEL" >served ;;
  *' logs '*) echo 'glm: the model needs 99 GB' ;;
  *) exit 3 ;;
esac
"""


@pytest.fixture
def switch(tmp_path: Path):
    """Run compose/switch while the API serves `base`; returns the process and what was called."""
    (tmp_path / "compose").mkdir()
    shutil.copy(REPOSITORY / "compose" / "switch", tmp_path / "compose")
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "docker").chmod(0o755)
    (tmp_path / "served").write_text("base\n")

    def run(*arguments: str, services: str = "api\nweb\n", **env: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        (tmp_path / "services").write_text(services)
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **env}
        done = subprocess.run(
            ["compose/switch", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        calls = tmp_path / "calls"
        return done, calls.read_text().splitlines() if calls.exists() else []

    return run


def served(folder: Path) -> str:
    return (folder / "served").read_text().strip()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "MODEL=mine\n"),
        ("MODEL=base\nRUN=mine\n", "MODEL=mine\nRUN=mine\n"),
        ("#MODEL=x\nRUN=mine", "#MODEL=x\nRUN=mine\nMODEL=mine\n"),
    ],
)
def test_a_model_is_prepared_then_served_then_written_into_env(before, after, switch, tmp_path):
    if before is not None:
        (tmp_path / ".env").write_text(before)
    done, calls = switch("mine")
    assert done.returncode == 0, done.stderr
    assert calls == ["prepare mine with model-init", "serve mine as api"]
    assert done.stdout.splitlines()[-1] == "switch: mine is served; to go back: make switch MODEL=base"
    assert (tmp_path / ".env").read_text() == after


@pytest.mark.parametrize(
    ("before", "family", "after"),
    [
        ("MODEL=base\n", "chatglm2", "MODEL=mine\nFAMILY=chatglm2\n"),
        ("MODEL=base\nFAMILY=glm4\n", "chatglm2", "MODEL=mine\nFAMILY=chatglm2\n"),
        ("MODEL=base\nFAMILY=glm4\n", "", "MODEL=mine\nFAMILY=\n"),
    ],
)
def test_the_family_of_the_former_model_is_not_used_for_the_next_one(before, family, after, switch, tmp_path):
    (tmp_path / ".env").write_text(before)
    done, calls = switch("mine", FAMILY=family)
    assert done.returncode == 0, done.stderr
    assert calls[0] == f"prepare mine{f' of {family}' if family else ''} with model-init"
    assert (tmp_path / ".env").read_text() == after


@pytest.mark.parametrize("api", ["api-gpu", "api-gpu-int4"])
def test_the_api_of_a_gpu_profile_is_prepared_without_a_gguf_file(api, switch):
    done, calls = switch("mine", services=f"{api}\nweb\n")
    assert (done.returncode, calls) == (0, ["prepare mine with model-init-plain", f"serve mine as {api}"])


def test_a_model_that_cannot_be_prepared_leaves_the_api_alone(switch, tmp_path):
    done, calls = switch("mien")
    assert (done.returncode, calls, served(tmp_path)) == (1, ["prepare mien with model-init"], "base")
    assert "switch: mien cannot be prepared (see above); base is still served" in done.stderr
    assert not (tmp_path / ".env").exists()


def test_a_model_that_does_not_start_is_replaced_by_the_former_one(switch, tmp_path):
    done, calls = switch("heavy")
    assert done.returncode == 1
    assert calls == ["prepare heavy with model-init", "serve heavy as api", "serve base as api"]
    assert served(tmp_path) == "base"
    assert done.stderr.splitlines() == [
        "glm: the model needs 99 GB",
        "switch: heavy does not start (see above); base is served again",
    ]
    assert not (tmp_path / ".env").exists()


@pytest.mark.parametrize(
    ("services", "env", "message"),
    [
        ("web\n", {}, "no API is running; start it: MODEL=mine docker compose up --detach --wait"),
        ("api\napi-gpu\n", {}, "several APIs are running: api api-gpu; stop all but one"),
        ("api\n", {"MODEL_PATH": "/models/x"}, "MODEL_PATH selects the model in place of MODEL; remove it from .env"),
    ],
)
def test_what_cannot_be_switched_is_reported_before_anything_is_called(services, env, message, switch):
    done, calls = switch("mine", services=services, **env)
    assert (done.returncode, calls) == (1, [])
    assert f"switch: {message}" in done.stderr


def test_a_model_path_in_env_is_found_as_well(switch, tmp_path):
    (tmp_path / ".env").write_text("MODEL_PATH=/models/x\n")
    assert "MODEL_PATH selects the model" in switch("mine")[0].stderr
    (tmp_path / ".env").write_text("MODEL_PATH=\n")
    assert switch("mine")[0].returncode == 0
