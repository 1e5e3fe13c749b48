"""An answer nobody wants any more lets go: between tokens, before the first, and while it waits for its turn.

And what answers that run at the same time must not do to each other: chance, and equally likely tokens.
"""

import contextlib
import threading
import time

import pytest
import torch

from entrypoints.engines.transformers_engine import TransformersEngine
from entrypoints.sampling import Sampling

LONG = {"max_new_tokens": 900, "temperature": 0}


@pytest.fixture(scope="module")
def batching(toy_native):
    engine = TransformersEngine.load_for_serving(toy_native, {}, "cpu", "float32", slots=2)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def llama(toy_gguf):
    pytest.importorskip("xllamacpp")
    from entrypoints.engines.llamacpp_engine import LlamaCppEngine

    engine = LlamaCppEngine.load(toy_gguf, slots=1, threads=1)
    yield engine
    engine.close()


@pytest.fixture(params=["one at a time", "batching", "llamacpp"])
def engine(request):
    """Each of the engines; asked for log probabilities, the batching one answers one at a time too."""
    names = {"one at a time": "toy_engine", "batching": "batching", "llamacpp": "llama"}
    return request.getfixturevalue(names[request.param])


def prompt_of(engine, text="裙子"):
    return engine.prompt_format.encode([{"role": "user", "content": text}], engine.tokenizer)


@contextlib.contextmanager
def started(engine, sampling):
    """An answer that has begun; closed afterwards."""
    with contextlib.closing(engine.generate(prompt_of(engine), sampling)) as tokens:
        next(tokens)
        yield tokens


def in_thread(work):
    """Run it in a thread; (thread, list that gets its result)."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    return thread, found


def test_cancelling_ends_an_answer_between_two_tokens(engine):
    cancelled = threading.Event()
    tokens = engine.generate(prompt_of(engine), Sampling(**LONG), None, cancelled)
    seen = [next(tokens) for _ in range(3)]
    cancelled.set()
    rest = list(tokens)
    assert len(seen) + len(rest) < LONG["max_new_tokens"]
    assert list(engine.generate(prompt_of(engine), Sampling(max_new_tokens=3, temperature=0))) == seen


def test_what_is_cancelled_before_it_began_yields_little_or_nothing(engine):
    cancelled = threading.Event()
    cancelled.set()
    assert len(list(engine.generate(prompt_of(engine), Sampling(**LONG), None, cancelled))) < 5


def test_an_answer_that_waits_for_its_turn_hears_that_nobody_wants_it(toy_engine):
    with started(toy_engine, Sampling(**LONG)):
        cancelled = threading.Event()
        answer = toy_engine.generate(prompt_of(toy_engine), Sampling(**LONG), None, cancelled)
        thread, found = in_thread(lambda: list(answer))
        time.sleep(0.2)
        assert thread.is_alive()
        cancelled.set()
        thread.join(60)
        assert found == [[]]


def test_a_caller_of_llamacpp_who_waits_for_the_slot_may_leave(llama):
    with started(llama, Sampling(**LONG)) as running:
        cancelled = threading.Event()
        answer = llama.generate(prompt_of(llama), Sampling(**LONG), None, cancelled)
        thread, found = in_thread(lambda: list(answer))
        time.sleep(0.1)
        cancelled.set()
        next(running)
    thread.join(60)
    assert len(found[0]) < LONG["max_new_tokens"]


def test_a_hundred_cancelled_answers_leave_the_engine_as_it_was(engine):
    expected = list(engine.generate(prompt_of(engine), Sampling(max_new_tokens=5, temperature=0)))
    for number in range(100):
        cancelled = threading.Event()
        tokens = engine.generate(prompt_of(engine, f"{number}"), Sampling(**LONG), None, cancelled)
        for _ in range(number % 3):
            next(tokens)
        (cancelled.set if number % 2 else tokens.close)()
        list(tokens)
    assert list(engine.generate(prompt_of(engine), Sampling(max_new_tokens=5, temperature=0))) == expected


def test_equally_likely_tokens_do_not_make_a_greedy_answer_a_lottery(toy_native):
    """Half precision makes two scores equal often; batching draws among the candidates that top_k = 1 leaves."""
    engine = TransformersEngine.load_for_serving(toy_native, {}, "cpu", "bfloat16", slots=2)
    try:
        with torch.no_grad():
            engine._batcher._model.lm_head.weight.zero_()  # every token is as likely as any other
        answers = {
            tuple(engine.generate(prompt_of(engine), Sampling(max_new_tokens=8, temperature=0))) for _ in range(5)
        }
        assert len(answers) == 1
    finally:
        engine.close()


@pytest.mark.parametrize("seed", [0, 2**63 - 1, -(2**63)])
def test_a_seed_repeats_the_answer_whatever_else_draws(toy_engine, seed):
    sampling = Sampling(max_new_tokens=12, temperature=2.0, top_p=1.0, seed=seed)
    first = list(toy_engine.generate(prompt_of(toy_engine), sampling))
    found = []
    for _ in range(2):
        for token in toy_engine.generate(prompt_of(toy_engine), sampling):
            torch.rand(3)  # what another answer would take of the generator that all share
            found.append(token)
    assert found == first * 2


def test_a_seed_leaves_answers_without_one_to_chance(toy_engine):
    drawn = Sampling(max_new_tokens=12, temperature=2.0, top_p=1.0)
    found = set()
    for _ in range(3):
        list(toy_engine.generate(prompt_of(toy_engine), Sampling(max_new_tokens=2, temperature=2.0, seed=1)))
        found.add(tuple(toy_engine.generate(prompt_of(toy_engine), drawn)))
    assert len(found) == 3
