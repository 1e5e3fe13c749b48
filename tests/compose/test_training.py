"""Fine-tuning in containers: alone, and over two nodes, one of which is lost; the result is served."""

import re
from collections.abc import Callable, Iterator

import openai
import pytest
from containers import wait_until

from compose import Project

pytestmark = pytest.mark.timeout(900)
SHORT = "--max-steps {steps} --save-steps 2 --per-device-train-batch-size 4 --logging-steps 1 --max-train-samples 64"


@pytest.fixture
def training(make_project: Callable[..., Project], small_models) -> Iterator[Callable[..., Project]]:
    """A project that trains the untrained toy."""

    def make(profile: str, run: str, steps: int, **more: object) -> Project:
        flags = f"{SHORT.format(steps=steps)} {more.pop('more_flags', '')}"
        return make_project(profile, FOLDERS_DIR=small_models, MODEL="toy", RUN=run, TRAIN_ARGS=flags, **more)

    yield make


def lines_of(project: Project, service: str) -> Callable[[], str]:
    return lambda: project.logs(service)[-3000:]


def test_a_run_on_one_machine_ends_with_a_checkpoint_that_is_served_by_setting_one_variable(training, make_project):
    project = training("train", "mine", 4)
    project.compose("up", "--no-build", "--exit-code-from", "train", "train", seconds=600)
    assert "/outputs/mine loads and answers" in project.logs("train")
    served = make_project(MODEL="mine")
    served.compose("up", "--detach", "--wait", "--no-build", "api", seconds=600)
    base = f"http://127.0.0.1:{served.environment['API_PORT']}/v1"
    with openai.OpenAI(base_url=base, api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["mine-q4_0"]
        messages = [{"role": "user", "content": "你好"}]
        answer = client.chat.completions.create(model="mine-q4_0", messages=messages, max_tokens=4, temperature=0)
        assert answer.usage.completion_tokens >= 1
    served.compose("down")


def test_two_nodes_train_together_one_is_lost_and_the_run_goes_on(training):
    project = training("train-multi", "pair", 2000)
    project.compose("up", "--detach", "--no-build", "train-0", "train-1", seconds=600)
    wait_until(lambda: "step 4:" in project.logs("train-0"), 500, lines_of(project, "train-0"))
    project.compose("kill", "--signal", "KILL", "train-1")
    wait_until(lambda: _ended(project, "train-0"), 300, lines_of(project, "train-0"))
    assert project.exit_code("train-0") == 1
    said = [line for line in project.logs("train-0").splitlines() if line.startswith("glm: ")]
    assert len(said) == 1, project.logs("train-0")
    assert re.search(r"another process of the run went away|saving checkpoint-\d+ failed", said[0])
    again = training("train-multi", "pair", 8)
    again.compose("up", "--detach", "--no-build", "--force-recreate", "train-0", "train-1", seconds=600)
    wait_until(lambda: _ended(again, "train-0") and _ended(again, "train-1"), 600, lines_of(again, "train-0"))
    log = again.logs("train-0")
    assert (again.exit_code("train-0"), again.exit_code("train-1")) == (0, 0), log
    assert "/outputs/pair loads and answers" in log
    assert "going on from /outputs/pair/checkpoint-" in log
    again.compose("down")


def _ended(project: Project, service: str) -> bool:
    return bool(project.compose("ps", "--quiet", "--all", "--status", "exited", service).stdout.strip())
