"""The KV cache of an earlier prompt, and a file in the page cache, are used again."""

import os

from entrypoints.chat_format.sampling import Sampling
from entrypoints.engines.llamacpp.engine import LlamaCppEngine
from entrypoints.engines.options import EngineOptions

GREEDY = Sampling(max_new_tokens=24, temperature=0)


def ids(engine, prompt):
    return [int(token) for token in engine.generate(prompt, GREEDY)]


def computed_tokens(engine, prompt):
    """Number of prompt tokens that llama.cpp computes, by its own count; the others are in the KV cache."""
    last = {}
    request = {"prompt": prompt, "stream": True, "n_predict": 1, "temperature": 0.0}
    engine._streams._server.handle_completions(request, last.update)
    return last["usage"]["prompt_tokens"] - last["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_prompt_that_continues_the_previous_one_computes_only_its_new_tokens(single_slot_llama, prompts):
    """The KV cache of the previous turn stays in the slot."""
    history = list(range(1500, 2300))  # not a prefix of any other test's prompt
    assert computed_tokens(single_slot_llama, history) == 800
    assert computed_tokens(single_slot_llama, [*history, *prompts[0]]) == len(prompts[0])


def test_a_prefix_shared_with_another_request_is_not_computed_again(toy_gguf):
    """The same instructions before different questions, also after other conversations have used every slot."""
    engine = LlamaCppEngine.load(toy_gguf, EngineOptions(slots=2, threads=1))
    instructions, questions = list(range(100, 500)), [list(range(start, start + 20)) for start in (600, 700, 800)]
    first = ids(engine, instructions + questions[0])
    assert computed_tokens(engine, instructions + questions[1]) == 20
    for start in (1000, 1400):
        assert computed_tokens(engine, list(range(start, start + 300))) == 300
    assert computed_tokens(engine, instructions + questions[2]) == 20
    assert ids(engine, instructions + questions[0]) == first
    engine.close()


def test_a_system_that_does_not_report_its_page_cache_loads_too(toy_gguf, prompts, monkeypatch):
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    engine = LlamaCppEngine.load(toy_gguf, EngineOptions(slots=1, threads=1))
    assert len(ids(engine, prompts[0])) == 24
    engine.close()
