"""Servers without sockets and weights: the real application with a scripted engine."""

from collections.abc import Callable, Iterator

import pytest
from fastapi import FastAPI
from scripted_engine import ScriptedEngine

from entrypoints.api.app import create_app
from entrypoints.api.auth import KeyRing
from entrypoints.api.state import ServerOptions, ServerState
from entrypoints.checkpoint.tokenizer import Tokenizer

MakeApp = Callable[..., FastAPI]


@pytest.fixture
def make_app(toy_tokenizer: Tokenizer) -> Iterator[MakeApp]:
    """Create an application: ServerOptions, `keys`, `usage`, `engine` (None: still loading) and `embedder`."""
    states = []

    def make(
        keys: KeyRing | None = None, engine: ScriptedEngine | str | None = "scripted", embedder=None, **options
    ) -> FastAPI:
        options = {"model": "toy", "slots": 2, **options}
        usage = options.pop("usage", None)
        state = ServerState(ServerOptions(**options), keys or KeyRing(), "scripted", usage)
        state.engine = ScriptedEngine(toy_tokenizer, options["slots"]) if engine == "scripted" else engine
        state.embedder = embedder
        states.append(state)
        return create_app(state)

    yield make
    for state in states:
        state.close()


@pytest.fixture
def app(make_app: MakeApp) -> FastAPI:
    return make_app()


@pytest.fixture
def engine(app: FastAPI) -> ScriptedEngine:
    return app.state.server.engine
