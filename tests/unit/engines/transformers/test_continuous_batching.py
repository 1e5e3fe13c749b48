"""Continuous batching: its answers, and what happens when its loop dies."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from scripted_engine import wait_until

from entrypoints.chat_format.sampling import Sampling
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.errors import ModelError

GREEDY = Sampling(max_new_tokens=12, temperature=0)


@pytest.fixture
def engine(batching_engine):
    return batching_engine


@pytest.fixture
def own_engine(toy_native):
    """An engine that the test may break or close."""
    engine = TransformersEngine.load(toy_native, EngineOptions(device="cpu", dtype="float32", slots=2))
    yield engine
    engine.close()


def prompts_of(engine, lengths):
    return [engine.prompt_format.encode([{"role": "user", "content": "裙" * n}], engine.tokenizer) for n in lengths]


def answers(engine, prompts, concurrency):
    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(lambda prompt: list(engine.generate(prompt, GREEDY)), prompts))


@pytest.mark.slow
def test_batched_answers_equal_those_of_plain_generation(engine, toy_engine):
    """Including prompts longer than a page (256 tokens) and than one prefill step (512)."""
    prompts = prompts_of(engine, [1, 5, 23, 255, 256, 300, 600, 900])
    plain = [list(toy_engine.generate(prompt, GREEDY)) for prompt in prompts]
    assert answers(engine, prompts, 1) == plain
    assert answers(engine, prompts, 2) == plain
    assert answers(engine, prompts, 8) == plain, "calls beyond the slots wait"


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_an_answer_with_nan_or_infinite_logits_fails_alone_and_the_loop_goes_on(own_engine, number, temperature):
    """As float16 overflows in one long prompt."""
    valid, invalid = prompts_of(own_engine, [5, 6])
    expected = list(own_engine.generate(valid, GREEDY))
    head = own_engine.model.lm_head.weight.data
    former = head[700].clone()
    head[700] = number
    for _ in range(2):
        with pytest.raises(ModelError, match="NaN or infinite logits; load it with --dtype float32 or bfloat16"):
            list(own_engine.generate(invalid, Sampling(max_new_tokens=4, temperature=temperature)))
    head[700] = former
    assert own_engine.fatal_error is None
    assert list(own_engine.generate(valid, GREEDY)) == expected


def test_full_pages_of_a_shared_prefix_are_not_computed_again(engine, toy_engine, caplog, monkeypatch):
    """`transformers` shares them between requests, and logs the number of matching tokens."""
    first, second = prompts_of(engine, [600, 700])
    list(engine.generate(first, GREEDY))
    log = logging.getLogger("ContinuousBatchingLogger")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    with caplog.at_level(logging.DEBUG, log.name):
        answer = list(engine.generate(second, GREEDY))
    assert "prefix match of 512 tokens" in caplog.text
    assert answer == list(toy_engine.generate(second, GREEDY))


def test_the_context_is_used_to_its_last_token(engine):
    (prompt,) = prompts_of(engine, [900])
    assert len(list(engine.generate(prompt, Sampling(max_new_tokens=5000, temperature=0)))) == 1024 - len(prompt)


@pytest.mark.parametrize(
    "fields", [{"temperature": 1e-30}, {"top_p": 1e-30}, {"top_k": 100_000}, {"temperature": 2.0, "top_p": 1.0}]
)
def test_no_allowed_sampling_value_ends_the_loop(engine, toy_engine, fields):
    """A sampled answer may end early with a stop token; the greedy one after it shows that the loop still works."""
    (prompt,) = prompts_of(engine, [3])
    assert len(list(engine.generate(prompt, Sampling(max_new_tokens=5, **fields)))) <= 5
    assert engine.fatal_error is None
    assert answers(engine, [prompt], 1) == [list(toy_engine.generate(prompt, GREEDY))]


def test_a_dead_loop_fails_running_and_new_answers_and_is_reported(own_engine):
    (prompt,) = prompts_of(own_engine, [3])
    running = own_engine.generate(prompt, Sampling(max_new_tokens=900, temperature=0))
    next(running)

    def fail(*args, **kwargs):
        raise RuntimeError("a defect")

    own_engine._batcher._model.forward = fail
    with pytest.raises(RuntimeError):
        list(running)
    wait_until(lambda: own_engine.fatal_error == "the batching loop died")
    with pytest.raises(RuntimeError):
        list(own_engine.generate(prompt, GREEDY))


def test_closing_ends_running_answers_with_an_error(own_engine):
    (prompt,) = prompts_of(own_engine, [3])
    running = own_engine.generate(prompt, Sampling(max_new_tokens=1000, temperature=0))
    next(running)
    closing = threading.Thread(target=own_engine.close)
    closing.start()
    with pytest.raises(RuntimeError):
        list(running)
    closing.join(60)
    assert not closing.is_alive()
