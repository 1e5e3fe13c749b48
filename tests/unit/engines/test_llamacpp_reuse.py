"""What llama.cpp has read or has in memory is not read again."""

import os
import time

from entrypoints.engines.llamacpp_engine import LlamaCppEngine
from entrypoints.sampling import Sampling

GREEDY = Sampling(max_new_tokens=24, temperature=0)


def ids(engine, prompt):
    return [int(token) for token in engine.generate(prompt, GREEDY)]


def test_a_prompt_that_goes_on_from_the_last_is_not_read_again(toy_gguf, prompts):
    """The turn before is kept in the slot: only what is new is read."""
    engine = LlamaCppEngine.load(toy_gguf, slots=1, threads=1)

    def seconds(prompt):
        started = time.perf_counter()
        next(engine.generate(prompt, GREEDY))
        return time.perf_counter() - started

    histories = [[id_] * 800 for id_ in prompts[1][-3:]]
    fresh, gone_on = zip(*((seconds(history), seconds([*history, *prompts[0]])) for history in histories), strict=True)
    assert min(gone_on) < min(fresh) / 2  # the best: the machine may do something else meanwhile
    engine.close()


def tokens_read(engine, prompt):
    """How many tokens of a prompt llama.cpp reads, by its own count: the others it has from before."""
    last = {}
    request = {"prompt": prompt, "stream": True, "n_predict": 1, "temperature": 0.0}
    engine._calls._server.handle_completions(request, last.update)
    return last["usage"]["prompt_tokens"] - last["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_beginning_that_another_request_had_is_not_read_again(toy_gguf):
    """The same instructions in front of different questions, also when other conversations have used every slot."""
    engine = LlamaCppEngine.load(toy_gguf, slots=2, threads=2)
    instructions, questions = list(range(100, 500)), [list(range(start, start + 20)) for start in (600, 700, 800)]
    first = ids(engine, instructions + questions[0])
    assert tokens_read(engine, instructions + questions[1]) == 20
    for start in (1000, 1400):
        assert tokens_read(engine, list(range(start, start + 300))) == 300
    assert tokens_read(engine, instructions + questions[2]) == 20
    assert ids(engine, instructions + questions[0]) == first
    engine.close()


def test_a_system_that_cannot_say_what_is_in_memory_loads_too(toy_gguf, prompts, monkeypatch):
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    engine = LlamaCppEngine.load(toy_gguf, slots=1, threads=2)
    assert len(ids(engine, prompts[0])) == 24
    engine.close()
