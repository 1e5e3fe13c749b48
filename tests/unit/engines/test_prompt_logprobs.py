"""The log probabilities of a prompt equal those of one forward pass, on every engine."""

import threading

import pytest
import torch

from entrypoints.engines.transformers import prompt_logprobs
from entrypoints.errors import UserError

TEXT = "北京😀穿什么，hello 裙子的版型很显瘦 x"  # with characters of several byte tokens


@pytest.fixture(scope="module")
def ids(toy_engine):
    tokenizer = toy_engine.tokenizer
    return [tokenizer.special_token_id("[gMASK]"), tokenizer.special_token_id("<sop>"), *tokenizer.encode(TEXT)]


@pytest.fixture(scope="module")
def logprobs(toy_engine, ids):
    """Log probabilities (T, V) of one forward pass."""
    with torch.inference_mode():
        return toy_engine.model(torch.tensor([ids])).logits[0].log_softmax(-1)


def check(tokens, ids, logprobs, tolerance):
    assert [*tokens] == ids
    assert (tokens[0].logprob, tokens[0].top) == (None, ())
    for place, token in enumerate(tokens[1:], start=1):
        assert token.logprob == pytest.approx(float(logprobs[place - 1, token]), abs=tolerance), place
        assert len(token.top) == 3
        values = [value for _, value in token.top]
        assert values == pytest.approx(logprobs[place - 1].topk(3).values.tolist(), abs=tolerance), place


@pytest.mark.parametrize("chunk", [3, 256])
def test_transformers_scores_a_prompt_in_chunks_as_at_once(chunk, toy_engine, ids, logprobs, monkeypatch):
    monkeypatch.setattr(prompt_logprobs, "CHUNK_TOKENS", chunk)
    check(toy_engine.score(ids, 3), ids, logprobs, 1e-4)


def test_llama_cpp_scores_a_prompt_as_transformers_does(llama, ids, logprobs):
    check(llama.score(ids, 3), ids, logprobs, 1e-2)


def test_a_likeliest_id_has_the_same_log_probability_in_both_places(toy_engine, llama, ids):
    """The evaluation harness compares the two to find whether greedy decoding gives the id."""
    for engine in (toy_engine, llama):
        greedy = [int(id_) for id_ in engine.generate_batch([ids], _greedy())[0]]
        scored = engine.score([*ids, *greedy], 1)[len(ids) :]
        assert all(token.top == ((token, token.logprob),) for token in scored)
        assert len(scored) == 5


def test_a_prompt_that_fills_the_context_is_refused(toy_engine, llama):
    for engine in (toy_engine, llama):
        with pytest.raises(UserError, match="the context length is 1024"):
            engine.score([5] * 1024, 0)


def test_scoring_can_be_cancelled(toy_engine, llama):
    cancelled = threading.Event()
    cancelled.set()
    for engine in (toy_engine, llama):
        assert len(engine.score([5] * 600, 0, None, cancelled)) <= 1


def _greedy():
    from entrypoints.chat_format.sampling import Sampling

    return Sampling(max_new_tokens=5, temperature=0)
