import pytest

from entrypoints.engines.llamacpp import engine


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Limit llama.cpp to one thread: at its barriers threads spin, which is slow on a busy machine."""
    monkeypatch.setattr(engine, "available_cpus", lambda: 1)
