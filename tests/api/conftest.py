"""Real servers: `glm serve` in its own process, queried through OpenAI's client and through plain HTTP."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import openai
import pytest
from serving_process import GLM, SCRIPTED, Server, serving

from entrypoints.engines.loading import ENGINE_PACKAGES

# Model of each engine, and the flags that make its results deterministic. A new engine is added here.
ENGINES = {
    "transformers": ("toy_native", ["--dtype", "float32"]),
    "llamacpp": ("toy_gguf", []),
    "vllm": ("toy_native", ["--dtype", "float32"]),
}
SEPARATE_ENVIRONMENT = ("vllm",)  # engines with their own environment: `make test-vllm`
INSTALLED = [
    name for name in ENGINES if name not in SEPARATE_ENVIRONMENT or importlib.util.find_spec(ENGINE_PACKAGES[name])
]


@pytest.fixture(scope="session", params=INSTALLED)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a tiny model and four slots, on each engine in turn."""
    if importlib.util.find_spec(ENGINE_PACKAGES[request.param]) is None:
        pytest.skip(f"the package {ENGINE_PACKAGES[request.param]} is not installed")
    fixture, flags = ENGINES[request.param]
    argv = [*GLM, "serve", "--model", request.getfixturevalue(fixture), "--served-model-name", "toy"]
    log = tmp_path_factory.mktemp("server") / "log"
    with serving([*argv, "--engine", request.param, "--slots", "4", *flags], log) as running:
        running.engine = request.param
        yield running.wait_ready()


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
def scripted(toy_native: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start servers with the scripted engine; takes flags and `env`."""
    with ExitStack() as running:

        def start(*flags: str | Path, env: dict[str, str] | None = None) -> Server:
            log = tmp_path / f"log-{len(list(tmp_path.glob('log-*')))}"
            return running.enter_context(serving([*SCRIPTED, "--model", toy_native, *flags], log, env))

        yield start


@pytest.fixture(scope="session")
def glm_serve(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """A context manager that runs `glm serve` with these flags."""

    @contextmanager
    def start(*flags: str | Path) -> Iterator[Server]:
        with serving([*GLM, "serve", *flags], tmp_path_factory.mktemp("server") / "log") as running:
            yield running

    return start
