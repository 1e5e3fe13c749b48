"""Fine-tuning in containers: on one node and on two, one of which fails; the result is served."""

import re
from collections.abc import Callable

import openai
import pytest
from containers import wait_until

from compose import Project

pytestmark = pytest.mark.timeout(900)
SHORT = (
    "--max-steps {steps} --save-steps 2 --save-total-limit 50 --per-device-train-batch-size 4 --logging-steps 1 "
    "--max-train-samples 64"
)


@pytest.fixture
def training(make_project: Callable[..., Project], small_models) -> Callable[..., Project]:
    """A project that trains the untrained demo model."""

    def make(profile: str, run: str, steps: int, **more: object) -> Project:
        flags = f"{SHORT.format(steps=steps)} {more.pop('more_flags', '')}"
        return make_project(profile, FOLDERS_DIR=small_models, MODEL="tiny", RUN=run, TRAIN_ARGS=flags, **more)

    return make


def log_tail(project: Project, service: str) -> Callable[[], str]:
    return lambda: project.logs(service)[-3000:]


def test_the_result_of_a_run_on_one_node_is_served_by_setting_one_variable(training, make_project):
    project = training("train", "mine", 4)
    project.compose("up", "--no-build", "--exit-code-from", "train", "train", seconds=600)
    assert "/outputs/mine loads and generates" in project.logs("train")
    served = make_project(MODEL="mine")
    served.compose("up", "--detach", "--wait", "--no-build", "api", seconds=600)
    base = f"http://127.0.0.1:{served.environment['API_PORT']}/v1"
    with openai.OpenAI(base_url=base, api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["mine-q4_0"]
        messages = [{"role": "user", "content": "你好"}]
        answer = client.chat.completions.create(model="mine-q4_0", messages=messages, max_tokens=4, temperature=0)
        assert answer.usage.completion_tokens >= 1
    served.compose("down")


def test_a_run_on_two_nodes_stops_when_one_fails_and_resumes_when_both_start_again(training):
    project = training("train-multi", "pair", 2000)
    project.compose("up", "--detach", "--no-build", "train-0", "train-1", seconds=600)
    wait_until(lambda: "step 4:" in project.logs("train-0"), 500, log_tail(project, "train-0"))
    project.compose("kill", "--signal", "KILL", "train-1")
    wait_until(lambda: _ended(project, "train-0"), 300, log_tail(project, "train-0"))
    assert project.exit_code("train-0") == 1
    errors = [line for line in project.logs("train-0").splitlines() if line.startswith("glm: ")]
    assert len(errors) == 1, project.logs("train-0")
    assert re.search(r"another process of the run died|saving checkpoint-\d+ failed", errors[0])
    again = training("train-multi", "pair", 8)
    again.compose("up", "--detach", "--no-build", "--force-recreate", "train-0", "train-1", seconds=600)
    wait_until(lambda: _ended(again, "train-0") and _ended(again, "train-1"), 600, log_tail(again, "train-0"))
    log = again.logs("train-0")
    assert (again.exit_code("train-0"), again.exit_code("train-1")) == (0, 0), log
    assert "/outputs/pair loads and generates" in log
    assert "resuming from /outputs/pair/checkpoint-" in log
    again.compose("down")


def _ended(project: Project, service: str) -> bool:
    return bool(project.compose("ps", "--quiet", "--all", "--status", "exited", service).stdout.strip())
