"""Batching through transformers' own loop: what it gives, and what happens when it dies."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from scripted_engine import wait_until

from entrypoints.engines.transformers_engine import TransformersEngine
from entrypoints.sampling import Sampling

GREEDY = Sampling(max_new_tokens=12, temperature=0)


@pytest.fixture
def engine(toy_native):
    engine = TransformersEngine.load_for_serving(toy_native, {}, "cpu", "float32", slots=2)
    yield engine
    engine.close()


def prompts_of(engine, lengths):
    return [engine.prompt_format.encode([{"role": "user", "content": "裙" * n}], engine.tokenizer) for n in lengths]


def answers(engine, prompts, at_once):
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda prompt: list(engine.generate(prompt, GREEDY)), prompts))


def test_batched_answers_equal_those_of_plain_generation(engine, toy_engine):
    """C5; prompts over a page (256) and over what is read in one step (512) among them."""
    prompts = prompts_of(engine, [1, 5, 23, 255, 256, 300, 600, 900])
    plain = [list(toy_engine.generate(prompt, GREEDY)) for prompt in prompts]
    assert answers(engine, prompts, 1) == plain
    assert answers(engine, prompts, 2) == plain
    assert answers(engine, prompts, 8) == plain, "more than there are slots wait for their turn"


def test_whole_pages_that_another_prompt_began_with_are_not_read_again(engine, toy_engine, caplog, monkeypatch):
    """transformers shares them among requests; its log is where it tells how many tokens it found."""
    first, second = prompts_of(engine, [600, 700])
    list(engine.generate(first, GREEDY))
    log = logging.getLogger("ContinuousBatchingLogger")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    with caplog.at_level(logging.DEBUG, log.name):
        answer = list(engine.generate(second, GREEDY))
    assert "prefix match of 512 tokens" in caplog.text
    assert answer == list(toy_engine.generate(second, GREEDY))


def test_the_window_is_used_to_its_last_token(engine):
    (prompt,) = prompts_of(engine, [900])
    assert len(list(engine.generate(prompt, Sampling(max_new_tokens=5000, temperature=0)))) == 1024 - len(prompt)


@pytest.mark.parametrize(
    "fields", [{"temperature": 1e-30}, {"top_p": 1e-30}, {"top_k": 100_000}, {"temperature": 2.0, "top_p": 1.0}]
)
def test_no_number_that_is_allowed_kills_the_loop(engine, fields):
    (prompt,) = prompts_of(engine, [3])
    assert len(list(engine.generate(prompt, Sampling(max_new_tokens=5, **fields)))) == 5
    assert engine.broken is None


def test_a_dead_loop_fails_what_runs_and_what_comes_and_says_so(engine):
    (prompt,) = prompts_of(engine, [3])
    running = engine.generate(prompt, Sampling(max_new_tokens=900, temperature=0))
    next(running)

    def fail(*args, **kwargs):
        raise RuntimeError("a defect")

    engine._batcher._model.forward = fail
    with pytest.raises(RuntimeError):
        list(running)
    wait_until(lambda: engine.broken == "the batching loop died")
    with pytest.raises(RuntimeError):
        list(engine.generate(prompt, GREEDY))


def test_closing_ends_running_answers_with_an_error(toy_native):
    engine = TransformersEngine.load_for_serving(toy_native, {}, "cpu", "float32", slots=2)
    (prompt,) = prompts_of(engine, [3])
    running = engine.generate(prompt, Sampling(max_new_tokens=1000, temperature=0))
    next(running)
    closing = threading.Thread(target=engine.close)
    closing.start()
    with pytest.raises(RuntimeError):
        list(running)
    closing.join(60)
    assert not closing.is_alive()
