"""Prometheus, as the system has it, scrapes servers with and without keys by the configuration that Compose mounts."""

import shutil
import subprocess

import httpx
import pytest
import yaml
from containers import REPOSITORY, wait_until
from processes import free_port
from serving_process import SCRIPTED, serving

FOLDER = REPOSITORY / "compose" / "prometheus"
KEY = "glm-opensesame"


@pytest.fixture(scope="module")
def targets(toy_native, tmp_path_factory):
    """Addresses of a server that wants the key, for metrics too, and of one without keys, as Compose starts them."""
    folder = tmp_path_factory.mktemp("servers")
    command = yaml.safe_load((REPOSITORY / "compose" / "serve.yaml").read_text())["services"]["api"]["command"]
    assert "--metrics-need-key" in command
    argv = [*SCRIPTED, "--model", toy_native, "--metrics-need-key", "--allowed-host", "api"]
    with (
        serving(argv, folder / "locked", {"API_KEY": KEY}) as locked,
        serving(argv, folder / "open") as open_,
    ):
        yield {
            name: server.wait_ready().url.removeprefix("http://")
            for name, server in (("locked", locked), ("open", open_))
        }


def write_config(folder, targets) -> None:
    """The shipped configuration with other addresses and key files, and an interval of a second."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    api, embeddings = config["scrape_configs"]
    assert api["authorization"] == embeddings["authorization"]
    assert api["static_configs"] == [{"targets": ["api:8000"]}]
    (folder / "key").write_text(f"{KEY}\n")
    (folder / "none").write_text("")  # as /dev/null, which Compose mounts where API_KEY_FILE is not set
    config["global"] = {"scrape_interval": "1s"}
    config["scrape_configs"] = [
        {
            **api,
            "job_name": f"{name} {key}",
            "authorization": {"credentials_file": f"{folder / key}"},
            "static_configs": [{"targets": [target]}],
        }
        for name, target in targets.items()
        for key in ("key", "none")
    ]
    shutil.copy(FOLDER / "rules.yml", folder)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))


def test_prometheus_sends_the_key_and_needs_none_where_none_is_required(targets, tmp_path):
    if not shutil.which("prometheus"):
        pytest.skip("Prometheus is not installed; apt-get install prometheus")
    write_config(tmp_path, targets)
    port = free_port()
    command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], cwd=tmp_path, stdout=log, stderr=log
        )

    def health() -> dict[str, str]:
        try:
            reply = httpx.get(f"http://127.0.0.1:{port}/api/v1/targets", trust_env=False).json()
        except httpx.TransportError:
            return {}
        return {one["labels"]["job"]: f"{one['health']} {one['lastError']}" for one in reply["data"]["activeTargets"]}

    def is_scraped() -> bool:
        states = health()
        return len(states) == 4 and not any("unknown" in state for state in states.values())

    try:
        wait_until(is_scraped, 60, (tmp_path / "log").read_text)
        up = "up "
        down = "down server returned HTTP status 401 Unauthorized"
        assert health() == {"locked key": up, "locked none": down, "open key": up, "open none": up}
        query = {"query": 'glm_engine_info{job="locked key"}'}
        found = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params=query, trust_env=False).json()
        assert len(found["data"]["result"]) == 1
    finally:
        process.terminate()
        process.wait()
