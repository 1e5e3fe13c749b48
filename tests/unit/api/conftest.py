"""Servers without sockets and weights: the real application around a scripted engine."""

from collections.abc import Callable, Iterator

import pytest
from fastapi import FastAPI
from scripted_engine import ScriptedEngine

from entrypoints.api.app import create_app
from entrypoints.api.auth import KeyRing
from entrypoints.api.server import Options, Serving
from entrypoints.checkpoint.tokenizer import Tokenizer

MakeApp = Callable[..., FastAPI]


@pytest.fixture
def make_app(toy_tokenizer: Tokenizer) -> Iterator[MakeApp]:
    """Make an application; keywords are those of Options, and `keys`, `engine` (None: still loading)."""
    made = []

    def make(keys: KeyRing | None = None, engine: ScriptedEngine | str | None = "scripted", **options) -> FastAPI:
        options = {"model": "toy", "slots": 2, **options}
        serving = Serving(Options(**options), keys or KeyRing(), "scripted")
        serving.engine = ScriptedEngine(toy_tokenizer, options["slots"]) if engine == "scripted" else engine
        made.append(serving)
        return create_app(serving)

    yield make
    for serving in made:
        serving.close()


@pytest.fixture
def app(make_app: MakeApp) -> FastAPI:
    return make_app()


@pytest.fixture
def engine(app: FastAPI) -> ScriptedEngine:
    return app.state.serving.engine
