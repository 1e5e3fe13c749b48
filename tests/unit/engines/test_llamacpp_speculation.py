"""Tokens that the conversation holds already are drafted and verified together: sooner there, otherwise the same."""

import pytest

from entrypoints.engines import llamacpp_calls, loading
from entrypoints.engines.llamacpp_engine import LlamaCppEngine
from entrypoints.errors import UserError
from entrypoints.sampling import Sampling

GREEDY = Sampling(max_new_tokens=40, temperature=0)


def ids(engine, prompt, sampling=GREEDY):
    return [int(token) for token in engine.generate(prompt, sampling)]


@pytest.fixture
def drafted(monkeypatch):
    """One entry for each token that came out of a draft: llama.cpp tells no odds of those."""
    tokens, tokens_of = [], llamacpp_calls.Calls._tokens

    def watch(calls, chunk, told):
        found = tokens_of(calls, chunk, told)
        if found and "__verbose" in chunk and not chunk["choices"][0]["logprobs"]:
            tokens.append(found[-1])
        return found

    monkeypatch.setattr(llamacpp_calls.Calls, "_tokens", watch)
    return tokens


@pytest.fixture
def repeating(scripted_llama, toy_tokenizer, prompts):
    """An engine, a prompt that holds its answer, and the answer, an emoji of four ids in it."""
    words = dict.fromkeys(toy_tokenizer.encode("一件好看的裙子，适合夏天穿，很显瘦。"))
    answer = [*words, *map(toy_tokenizer.byte, "👋".encode()), *range(300, 306)]
    assert len(set(answer)) == len(answer)

    def make(**options):
        engine = scripted_llama([*answer, toy_tokenizer.eos_id], **options)
        return engine, [*answer, *prompts[0]], answer

    return make


def test_an_answer_that_the_prompt_holds_is_the_same_and_takes_drafts(repeating, drafted):
    engine, prompt, answer = repeating(speculative=True)
    assert ids(engine, prompt) == answer
    assert len(drafted) >= 8


@pytest.mark.parametrize("most", range(1, 22))
def test_a_limit_amid_drafts_cuts_the_same_ids(most, repeating, toy_tokenizer):
    engine, prompt, answer = repeating(speculative=True)
    found = ids(engine, prompt, Sampling(max_new_tokens=most, temperature=0))
    assert len(found) == most
    emoji = answer.index(toy_tokenizer.byte("👋".encode()[0]))
    whole = emoji if emoji < most < emoji + 4 else most  # the ids of a started character are not told
    assert found[:whole] == answer[:whole]


def test_without_it_nothing_is_drafted(repeating, drafted):
    engine, prompt, answer = repeating()
    assert ids(engine, prompt) == answer
    assert drafted == []


def test_what_a_model_says_by_itself_stays_the_same(toy_gguf, llama, prompts, toy_engine, same_but_for_ties, drafted):
    engine = LlamaCppEngine.load(toy_gguf, slots=2, threads=1, speculative=True)
    for prompt in prompts:
        same_but_for_ties(ids(engine, prompt), ids(llama, prompt), toy_engine.model, prompt, GREEDY)
    assert drafted, "this model repeats itself"
    engine.close()


def test_odds_are_not_promised_with_it(repeating):
    assert "top_logprobs" not in repeating(speculative=True)[0].features
    assert "top_logprobs" in repeating()[0].features


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_other_engines_refuse_the_flag_by_name(engine, toy_native, monkeypatch):
    monkeypatch.setitem(loading.PACKAGES, engine, "json")  # whichever of them is installed
    with pytest.raises(UserError, match=f"--speculative is not for the engine {engine}; leave it out"):
        loading.check(engine, toy_native, {}, speculative=True)
