"""/v1/completions with echo: the prompt is part of the response, with the log probabilities of its tokens."""

import openai
import pytest
import torch
from transformers import GlmForCausalLM

from entrypoints.checkpoint.tokenizer import load_tokenizer

PROMPT = "裙子的版型很显瘦，hello 😀"
TOLERANCE = {"transformers": 1e-3, "vllm": 1e-3, "llamacpp": 1e-2}  # a GGUF file computes in half precision


def complete(client, prompt=PROMPT, **fields):
    return client.completions.create(model="toy", prompt=prompt, **{"temperature": 0, "max_tokens": 1, **fields})


@pytest.fixture(scope="module")
def logprobs_after(toy_native):
    """The log probabilities of these ids in a forward pass, each after the ids before it."""
    model = GlmForCausalLM.from_pretrained(toy_native, dtype=torch.float32)

    def compute(ids):
        with torch.inference_mode():
            found = model(torch.tensor([ids])).logits[0].log_softmax(-1)  # (T, V)
        return [float(found[place - 1, ids[place]]) for place in range(1, len(ids))]

    return compute


@pytest.mark.slow
def test_the_log_probabilities_of_a_text_are_those_of_its_logits(client, server, toy_native, logprobs_after):
    tokenizer = load_tokenizer(toy_native)
    start = [tokenizer.special_token_id(name) for name in ("[gMASK]", "<sop>")]
    ids = tokenizer.encode(PROMPT)
    choice = complete(client, echo=True, logprobs=1).choices[0]
    assert choice.text.startswith(PROMPT)
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == len(ids) + 1
    expected = logprobs_after([*start, *ids])[1:]
    assert choice.logprobs.token_logprobs[:-1] == pytest.approx(expected, abs=TOLERANCE[server.engine])
    assert all(len(top) == 1 for top in choice.logprobs.top_logprobs)


def test_the_first_of_given_ids_has_no_log_probability(client, server, toy_native, logprobs_after):
    batches = [load_tokenizer(toy_native).encode(text) for text in (PROMPT, "上衣材质牛仔布")]
    choices = complete(client, batches, echo=True, logprobs=0).choices
    assert len(choices) == 2
    for ids, choice in zip(batches, choices, strict=True):
        assert choice.logprobs.token_logprobs[0] is choice.logprobs.top_logprobs[0] is None
        expected = logprobs_after(ids)
        assert choice.logprobs.token_logprobs[1:-1] == pytest.approx(expected, abs=TOLERANCE[server.engine])


@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_stream_equals_the_complete_response(client, logprobs):
    fields = {"echo": True, "logprobs": logprobs, "max_tokens": 4}
    complete_ = complete(client, **fields)
    choices = [chunk.choices[0] for chunk in complete(client, stream=True, **fields)]
    assert "".join(choice.text for choice in choices) == complete_.choices[0].text
    if logprobs:
        values = [value for choice in choices if choice.logprobs for value in choice.logprobs.token_logprobs]
        assert values == pytest.approx(complete_.choices[0].logprobs.token_logprobs, abs=1e-4)


def test_echo_without_generation_scores_the_prompt_only(client):
    answer = complete(client, echo=True, logprobs=1, max_tokens=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (PROMPT, "length")
    assert answer.usage.completion_tokens == 0
    with_answer = complete(client, echo=True, logprobs=1)
    assert with_answer.usage.completion_tokens == 1
    assert with_answer.usage.prompt_tokens == answer.usage.prompt_tokens == len(answer.choices[0].logprobs.tokens) + 2
    with pytest.raises(openai.BadRequestError, match="max_tokens 0 requires echo"):
        complete(client, max_tokens=0)
