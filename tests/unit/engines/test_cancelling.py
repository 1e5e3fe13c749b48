"""Cancelling an answer: between tokens, before the first one, and while it waits for a slot.

Also what concurrent answers must not share: random numbers, and the choice between equally likely tokens.
"""

import contextlib
import threading
import time

import pytest
import torch

from entrypoints.chat_format.sampling import Sampling
from entrypoints.engines.llamacpp.engine import LlamaCppEngine
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine

LONG = {"max_new_tokens": 900, "temperature": 0}


@pytest.fixture(params=["one at a time", "batching", "llamacpp"])
def engine(request):
    """Each engine, transformers with and without batching."""
    names = {"one at a time": "toy_engine", "batching": "batching_engine", "llamacpp": "single_slot_llama"}
    return request.getfixturevalue(names[request.param])


def prompt_of(engine, text="裙子"):
    return engine.prompt_format.encode([{"role": "user", "content": text}], engine.tokenizer)


@contextlib.contextmanager
def started(engine, sampling):
    """An answer that has started; closed afterwards."""
    with contextlib.closing(engine.generate(prompt_of(engine), sampling)) as tokens:
        next(tokens)
        yield tokens


def in_thread(work):
    """Run it in a thread; returns the thread, and a list that receives its result."""
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


def test_an_answer_cancelled_before_it_starts_yields_almost_nothing(engine):
    cancelled = threading.Event()
    cancelled.set()
    assert len(list(engine.generate(prompt_of(engine), Sampling(**LONG), None, cancelled))) < 5


def test_an_answer_that_waits_for_its_slot_can_be_cancelled(toy_engine):
    with started(toy_engine, Sampling(**LONG)):
        cancelled = threading.Event()
        answer = toy_engine.generate(prompt_of(toy_engine), Sampling(**LONG), None, cancelled)
        thread, found = in_thread(lambda: list(answer))
        time.sleep(0.2)
        assert thread.is_alive()
        cancelled.set()
        thread.join(60)
        assert found == [[]]


def test_an_answer_of_llamacpp_that_waits_for_its_slot_can_be_cancelled(single_slot_llama):
    llama = single_slot_llama
    with started(llama, Sampling(**LONG)) as running:
        cancelled = threading.Event()
        answer = llama.generate(prompt_of(llama), Sampling(**LONG), None, cancelled)
        thread, found = in_thread(lambda: list(answer))
        time.sleep(0.1)
        cancelled.set()
        next(running)
    thread.join(60)
    assert len(found[0]) < LONG["max_new_tokens"]


def test_a_hundred_cancelled_answers_leave_the_engine_unchanged(engine):
    expected = list(engine.generate(prompt_of(engine), Sampling(max_new_tokens=5, temperature=0)))
    for number in range(100):
        cancelled = threading.Event()
        tokens = engine.generate(prompt_of(engine, f"{number}"), Sampling(**LONG), None, cancelled)
        for _ in range(number % 3):
            next(tokens)
        (cancelled.set if number % 2 else tokens.close)()
        list(tokens)
    assert list(engine.generate(prompt_of(engine), Sampling(max_new_tokens=5, temperature=0))) == expected


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("engine_class", [TransformersEngine, LlamaCppEngine])
def test_a_closed_engine_has_no_thread(toy_native, toy_gguf, engine_class, slots):
    """A thread that still frees tensors while the interpreter exits can abort the process."""
    before = threading.enumerate()
    model = toy_native if engine_class is TransformersEngine else toy_gguf
    engine = engine_class.load(model, EngineOptions(device="cpu", threads=1, slots=slots))
    with started(engine, Sampling(**LONG)):
        pass
    list(engine.generate(prompt_of(engine), Sampling(max_new_tokens=3, temperature=0)))
    engine.close()
    assert [thread for thread in threading.enumerate() if thread not in before] == []


def test_greedy_answers_with_equally_likely_tokens_are_deterministic(toy_native):
    """Equal logits are common in bfloat16; batching samples among the candidates that top_k of 1 keeps."""
    engine = TransformersEngine.load(toy_native, EngineOptions(device="cpu", dtype="bfloat16", slots=2))
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
def test_a_seed_repeats_the_answer_whatever_uses_the_global_generator(toy_engine, seed):
    sampling = Sampling(max_new_tokens=12, temperature=2.0, top_p=1.0, seed=seed)
    first = list(toy_engine.generate(prompt_of(toy_engine), sampling))
    found = []
    for _ in range(2):
        for token in toy_engine.generate(prompt_of(toy_engine), sampling):
            torch.rand(3)  # as a concurrent answer without a seed does
            found.append(token)
    assert found == first * 2


def test_a_seed_does_not_make_later_answers_without_one_repeat(toy_engine):
    """Four equal answers have a probability below 1e-9: the most likely one, empty, has 0.004."""
    unseeded = Sampling(max_new_tokens=12, temperature=2.0, top_p=1.0)
    answers = set()
    for _ in range(4):
        list(toy_engine.generate(prompt_of(toy_engine), Sampling(max_new_tokens=2, temperature=2.0, seed=1)))
        answers.add(tuple(toy_engine.generate(prompt_of(toy_engine), unseeded)))
    assert len(answers) > 1
