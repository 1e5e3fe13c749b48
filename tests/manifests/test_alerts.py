"""Prometheus itself reads the alert rules, and each fires when what it says has happened, and not before."""

import json
import shutil
import subprocess

import pytest
import yaml
from manifests import K8S

# alert -> what a quarter of an hour of it looks like; a value with x30 is repeated for each minute
SERIES = {
    "GlmDown": {'up{job="api", instance="a"}': "0x30"},
    "GlmQueueLong": {'glm_queue_length{instance="a"}': "17x30"},
    "GlmRefuses": {'glm_requests_total{status="429"}': "0+30x30"},
    "GlmErrors": {'glm_requests_total{status="200"}': "0+60x30", 'glm_requests_total{status="500"}': "0+6x30"},
    "GlmSlowFirstToken": {
        'glm_time_to_first_token_seconds_bucket{le="10"}': "0+1x30",
        'glm_time_to_first_token_seconds_bucket{le="20"}': "0+10x30",
        'glm_time_to_first_token_seconds_bucket{le="+Inf"}': "0+10x30",
    },
}
# the same hour on a good day
GOOD = {
    'up{job="api", instance="a"}': "1x30",
    'glm_queue_length{instance="a"}': "16x30",
    'glm_requests_total{status="200"}': "0+600x30",
    'glm_requests_total{status="429"}': "0+6x30",
    'glm_requests_total{status="500"}': "0+1x30",
    'glm_time_to_first_token_seconds_bucket{le="10"}': "0+96x30",
    'glm_time_to_first_token_seconds_bucket{le="+Inf"}': "0+100x30",
}
RULES = yaml.safe_load((K8S / "components" / "monitoring" / "rules.yaml").read_text(encoding="utf-8"))["spec"]


@pytest.fixture
def promtool(tmp_path):
    """Runs it in a folder in which the rules lie, and returns what it said."""
    if not shutil.which("promtool"):
        pytest.skip("no promtool here: apt-get install prometheus")
    (tmp_path / "rules.yaml").write_text(json.dumps(RULES))

    def run(*words: str, **files: dict) -> subprocess.CompletedProcess:
        for name, content in files.items():
            (tmp_path / f"{name}.yaml").write_text(json.dumps(content))
        return subprocess.run(["promtool", *words], cwd=tmp_path, capture_output=True, text=True, timeout=100)

    return run


def firing(series: dict[str, str], minute: int, alert: str, fires: bool) -> dict:
    """A test of promtool: does this alert fire in that minute? Its labels and its words are the rules' own."""
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing"}}) or vector(0)',
                "eval_time": f"{minute}m",
                "exp_samples": [{"labels": "{}", "value": int(fires)}],
            }
        ],
    }


def test_prometheus_reads_the_rules(promtool):
    done = promtool("check", "rules", "rules.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS: 5 rules found" in done.stdout


@pytest.mark.parametrize("alert", SERIES)
def test_an_alert_fires_after_a_while_and_on_a_good_day_never(promtool, alert):
    tests = [
        firing(SERIES[alert], 25, alert, fires=True),
        firing(SERIES[alert], 2, alert, fires=False),
        firing(GOOD, 25, alert, fires=False),
    ]
    done = promtool("test", "rules", "tests.yaml", tests={"rule_files": ["rules.yaml"], "tests": tests})
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_api_that_is_gone_altogether_is_an_alert_too(promtool):
    """No pod at all leaves no `up` to be 0."""
    tests = [firing({'up{job="other"}': "1x30"}, 25, "GlmDown", fires=True)]
    done = promtool("test", "rules", "tests.yaml", tests={"rule_files": ["rules.yaml"], "tests": tests})
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test():
    assert {rule["alert"] for group in RULES["groups"] for rule in group["rules"]} == set(SERIES)
