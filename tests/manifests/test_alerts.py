"""promtool accepts the alert rules; each alert fires in its situation and not otherwise."""

import json
import shutil
import subprocess

import pytest
import yaml
from manifests import K8S

# alert -> time series that make it fire; x30 repeats a value for 30 minutes
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
# time series of normal operation
NORMAL = {
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
    """Run promtool in a folder that contains the rules."""
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed; apt-get install prometheus")
    (tmp_path / "rules.yaml").write_text(json.dumps(RULES))

    def run(*arguments: str, **files: dict) -> subprocess.CompletedProcess:
        for name, content in files.items():
            (tmp_path / f"{name}.yaml").write_text(json.dumps(content))
        return subprocess.run(["promtool", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=100)

    return run


def firing(series: dict[str, str], minute: int, alert: str, fires: bool) -> dict:
    """A promtool test: does this alert fire at that minute?"""
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


def test_promtool_accepts_the_rules(promtool):
    done = promtool("check", "rules", "rules.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS: 5 rules found" in done.stdout


@pytest.mark.parametrize("alert", SERIES)
def test_an_alert_fires_after_its_delay_and_not_in_normal_operation(promtool, alert):
    tests = [
        firing(SERIES[alert], 25, alert, fires=True),
        firing(SERIES[alert], 2, alert, fires=False),
        firing(NORMAL, 25, alert, fires=False),
    ]
    done = promtool("test", "rules", "tests.yaml", tests={"rule_files": ["rules.yaml"], "tests": tests})
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_api_without_any_pod_is_an_alert_too(promtool):
    """Without a pod the series `up` is absent instead of 0."""
    tests = [firing({'up{job="other"}': "1x30"}, 25, "GlmDown", fires=True)]
    done = promtool("test", "rules", "tests.yaml", tests={"rule_files": ["rules.yaml"], "tests": tests})
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test():
    assert {rule["alert"] for group in RULES["groups"] for rule in group["rules"]} == set(SERIES)
