"""What transformers answers, for the tests of other engines."""

from collections.abc import Sequence
from pathlib import Path

from entrypoints.engines.transformers_engine import TransformersEngine
from entrypoints.sampling import Sampling

ANSWER = 24  # tokens


def greedy(length: int = ANSWER, **other: object) -> Sampling:
    return Sampling(max_new_tokens=length, temperature=0, **other)


def reference_answers(model: Path, prompts: Sequence[Sequence[int]], adapter: Path | None = None) -> list[list[int]]:
    engine = TransformersEngine.load(model, adapter, device="cpu", dtype="float32")
    return [list(engine.generate(prompt, greedy())) for prompt in prompts]
