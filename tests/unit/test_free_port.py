"""Servers of two workers never share a port."""

import random

import pytest
from processes import free_port, ports


def drawn(monkeypatch: pytest.MonkeyPatch, worker: str, count: int = 6000) -> set[int]:
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "2")
    monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
    sequence = ports()
    return {next(sequence) for _ in range(count)}


def test_two_workers_draw_different_ports(monkeypatch):
    first, second = drawn(monkeypatch, "gw0"), drawn(monkeypatch, "gw1")
    assert len(first) == len(second) == 6000
    assert not first & second
    assert drawn(monkeypatch, "gw2") == first  # the worker that replaces gw0 after a crash


def test_a_seed_does_not_determine_the_ports():
    """A test that trains in its own process seeds `random`."""
    state = random.getstate()
    try:
        drawn = []
        for _ in range(2):
            random.seed(42)
            drawn.append([free_port() for _ in range(5)])
    finally:
        random.setstate(state)
    assert not set(drawn[0]) & set(drawn[1])
