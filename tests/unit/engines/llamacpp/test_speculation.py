"""Prompt lookup: tokens that repeat the conversation are drafted and verified together; the answer is the same."""

import pytest

from entrypoints.chat_format.sampling import Sampling
from entrypoints.engines import loading
from entrypoints.engines.llamacpp import completions
from entrypoints.engines.llamacpp.engine import LlamaCppEngine
from entrypoints.engines.options import EngineOptions
from entrypoints.errors import UserError

GREEDY = Sampling(max_new_tokens=40, temperature=0)


def ids(engine, prompt, sampling=GREEDY):
    return [int(token) for token in engine.generate(prompt, sampling)]


@pytest.fixture
def drafted(monkeypatch):
    """The drafted tokens, one per chunk: llama.cpp reports no probabilities for them."""
    tokens, tokens_of = [], completions.CompletionStreams._tokens

    def watch(streams, chunk, yielded):
        found = tokens_of(streams, chunk, yielded)
        if found and "__verbose" in chunk and not chunk["choices"][0]["logprobs"]:
            tokens.append(found[-1])
        return found

    monkeypatch.setattr(completions.CompletionStreams, "_tokens", watch)
    return tokens


@pytest.fixture
def repeating(scripted_llama, toy_tokenizer, prompts):
    """An engine, a prompt that contains its answer, and the answer, which contains an emoji of four ids."""
    tokens = dict.fromkeys(toy_tokenizer.encode("一件好看的裙子，适合夏天穿，很显瘦。"))
    answer = [*tokens, *map(toy_tokenizer.byte_token_id, "👋".encode()), *range(300, 306)]
    assert len(set(answer)) == len(answer)

    def make(**options):
        engine = scripted_llama([*answer, toy_tokenizer.eos_id], **options)
        return engine, [*answer, *prompts[0]], answer

    return make


def test_an_answer_that_repeats_the_prompt_is_the_same_and_uses_drafts(repeating, drafted):
    engine, prompt, answer = repeating(speculative=True)
    assert ids(engine, prompt) == answer
    assert len(drafted) >= 8


@pytest.mark.parametrize("length", range(1, 22))
def test_a_token_limit_inside_a_draft_cuts_the_same_ids(length, repeating, toy_tokenizer):
    engine, prompt, answer = repeating(speculative=True)
    found = ids(engine, prompt, Sampling(max_new_tokens=length, temperature=0))
    assert len(found) == length
    emoji = answer.index(toy_tokenizer.byte_token_id("👋".encode()[0]))
    known = emoji if emoji < length < emoji + 4 else length  # llama.cpp does not report the ids of a cut character
    assert found[:known] == answer[:known]


def test_nothing_is_drafted_without_the_option(repeating, drafted):
    engine, prompt, answer = repeating()
    assert ids(engine, prompt) == answer
    assert drafted == []


def test_answers_that_do_not_repeat_the_prompt_stay_the_same(
    toy_gguf, llama, prompts, toy_engine, same_but_for_ties, drafted
):
    engine = LlamaCppEngine.load(toy_gguf, EngineOptions(slots=2, threads=1, speculative=True))
    for prompt in prompts:
        same_but_for_ties(ids(engine, prompt), ids(llama, prompt), toy_engine.model, prompt, GREEDY)
    assert drafted, "the untrained model repeats itself"
    engine.close()


def test_log_probabilities_are_not_offered_with_speculation(repeating):
    assert "top_logprobs" not in repeating(speculative=True)[0].features
    assert "top_logprobs" in repeating()[0].features


def test_the_transformers_engine_rejects_the_option_by_name(toy_native):
    with pytest.raises(UserError, match="--speculative is not supported by the engine transformers; omit it"):
        loading.check_engine_options(toy_native, EngineOptions(engine="transformers", speculative=True))
