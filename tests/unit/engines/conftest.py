"""Engines that several modules share: loading one takes longer than most tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from entrypoints.engines.llamacpp.engine import LlamaCppEngine
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine


@pytest.fixture(scope="session")
def batching_engine(toy_native: Path) -> Iterator[TransformersEngine]:
    """The untrained tiny model with continuous batching, two slots."""
    engine = TransformersEngine.load(toy_native, EngineOptions(device="cpu", dtype="float32", slots=2))
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def single_slot_llama(toy_gguf: Path) -> Iterator[LlamaCppEngine]:
    """The untrained tiny model in llama.cpp with one slot."""
    engine = LlamaCppEngine.load(toy_gguf, EngineOptions(threads=1))
    yield engine
    engine.close()
