"""Two servers with a model whose answers are known, and the clients' environment of `make test-clients`."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import contract
import known_model
import pytest
from client_table import NODE
from serving_process import GLM, serving

FOLDER = Path(__file__).parent
VENV = Path(os.environ.get("CLIENTS_VENV", FOLDER.parents[1] / ".venv-clients"))
CONSTANTS = {name: value for name, value in vars(contract).items() if name.isupper()}
CLIENTS_AT_A_TIME = 2
SECONDS = 240  # for one client, which imports up to 2,000 modules


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip these tests without their environment, and Node's without Node."""
    for item in items:
        if FOLDER not in item.path.parents:
            continue
        if not (VENV / "bin" / "python").exists():
            item.add_marker(pytest.mark.skip(reason=f"no environment {VENV}: make test-clients"))
        elif NODE in item.nodeid and not (VENV / "node" / "node_modules").is_dir():
            item.add_marker(pytest.mark.skip(reason="Node is not installed"))


@pytest.fixture(scope="session")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Base URL of the API by engine."""
    folder = tmp_path_factory.mktemp("known")
    models = known_model.write(folder)
    with ExitStack() as running:
        servers = {
            engine: running.enter_context(
                serving([*GLM, "serve", "--model", model, "--served-model-name", contract.MODEL], folder / engine)
            )
            for engine, model in models.items()
        }
        yield {engine: f"{server.wait_ready().url}/v1" for engine, server in servers.items()}


@pytest.fixture(scope="session")
def shown(urls: dict[str, str], request: pytest.FixtureRequest) -> Iterator[Callable[[str], dict]]:
    """What a script shows: {engine: {step: result}}. All scripts of the selected tests start with the first test."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    scripts = {one["script"] for one in parameters if "script" in one}
    with ThreadPoolExecutor(CLIENTS_AT_A_TIME) as pool:
        results = {script: pool.submit(run_script, script, urls) for script in sorted(scripts)}
        yield lambda script: results[script].result()


@pytest.fixture
def clients_python() -> Path:
    """The interpreter of the clients' environment."""
    return VENV / "bin" / "python"


@pytest.fixture
def run_client() -> Callable[[str, dict[str, str]], dict[str, dict[str, dict]]]:
    """`run_script`, for other servers."""
    return run_script


def run_script(script: str, urls: dict[str, str]) -> dict[str, dict[str, dict]]:
    """Run one script against all servers."""
    command = [VENV / "bin" / "python", FOLDER / script]
    if script.endswith(".mjs"):
        for module in ("contract.mjs", script):  # Node looks for packages beside the script
            shutil.copy(FOLDER / module, VENV / "node")
        command = ["node", VENV / "node" / script]
    environment = {**os.environ, "CONTRACT": json.dumps(CONSTANTS)}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([*command, *urls.values()], capture_output=True, text=True, timeout=SECONDS, env=environment)
    engines = {url: engine for engine, url in urls.items()}
    found: dict[str, dict[str, dict]] = {engine: {} for engine in urls}
    for line in done.stdout.splitlines():
        if line.startswith('{"url"'):
            result = json.loads(line)
            found[engines[result["url"]]][result["step"]] = result
    assert all(found.values()), f"{script} ended with {done.returncode}: {done.stdout[-2000:]} {done.stderr[-4000:]}"
    return found
