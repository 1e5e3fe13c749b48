"""Greedy answers of the transformers engine, which the tests of other engines compare with."""

from collections.abc import Sequence
from pathlib import Path

from entrypoints.chat_format.sampling import Sampling
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine

ANSWER_TOKENS = 24


def greedy(length: int = ANSWER_TOKENS, **other: object) -> Sampling:
    return Sampling(max_new_tokens=length, temperature=0, **other)


def reference_answers(model: Path, prompts: Sequence[Sequence[int]], adapter: Path | None = None) -> list[list[int]]:
    engine = TransformersEngine.load(model, EngineOptions(adapter=adapter, device="cpu", dtype="float32"))
    return [list(engine.generate(prompt, greedy())) for prompt in prompts]
