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


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("length", [6, 600], ids=["one step", "a prefill in two steps"])
def test_nan_and_infinity_end_the_loop_with_the_remedy(own_engine, number, length):
    """As float16 overflows in one prompt. Pages with NaN would stay in the cache for later answers."""
    (prompt,) = prompts_of(own_engine, [length])
    own_engine.model.lm_head.weight.data[700] = number
    with pytest.raises(ModelError, match="NaN or infinite logits; load it with --dtype float32 or bfloat16"):
        list(own_engine.generate(prompt, Sampling(max_new_tokens=4, temperature=0.8)))
    wait_until(lambda: own_engine.fatal_error)
    assert "load it with --dtype float32 or bfloat16" in own_engine.fatal_error


def test_nan_in_the_prompt_of_one_answer_leaves_no_answer_without_an_end(own_engine):
    (valid,) = prompts_of(own_engine, [5])
    invalid = [*valid, 777]
    own_engine.model.get_input_embeddings().weight.data[777] = torch.nan
    running = own_engine.generate(valid, Sampling(max_new_tokens=900, temperature=0))
    next(running)
    with pytest.raises(ModelError, match="--dtype float32 or bfloat16"):
        list(own_engine.generate(invalid, GREEDY))
    with pytest.raises(ModelError, match="--dtype float32 or bfloat16"):
        list(running)


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
