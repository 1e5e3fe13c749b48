"""Options of the vLLM engine that change how it computes, not what."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from reference import greedy, reference_answers

from entrypoints.engines.options import EngineOptions
from entrypoints.engines.vllm.engine import VllmEngine


@pytest.mark.timeout(600)
def test_two_copies_of_the_model_share_the_requests_and_answer_alike(toy: Path, lora: Path, prompts: list[list[int]]):
    options = EngineOptions(adapters={"tuned": lora}, slots=4, dtype="float32", data_parallel_size=2)
    engine = VllmEngine.load(toy, options)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: list(engine.generate(prompt, greedy())), prompts))
        tuned = list(pool.map(lambda prompt: list(engine.generate(prompt, greedy(), "tuned")), [prompts[5]] * 4))
    engine.close()
    assert answers == reference_answers(toy, prompts)
    assert tuned == [tuned[0]] * 4, "both copies have the adapter"
    assert tuned[0] != answers[5]


@pytest.mark.timeout(600)
def test_speculation_changes_no_answer(toy: Path, prompts: list[list[int]]):
    engine = VllmEngine.load(toy, EngineOptions(slots=4, dtype="float32", speculative=True))
    repeated = [[*prompt, *prompt] for prompt in prompts[5:15]]  # what the drafts are taken from
    answers = [list(engine.generate(prompt, greedy())) for prompt in repeated]
    tokens = list(engine.generate(repeated[0], greedy(top_logprobs=2)))
    engine.close()
    assert answers == reference_answers(toy, repeated)
    assert tokens == answers[0]
    assert all(token.logprob is not None for token in tokens)
