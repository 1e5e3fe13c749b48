"""`glm serve --speculative ngram`, queried through the API."""

import openai
import pytest


@pytest.fixture(scope="module")
def speculative(glm_serve, toy_gguf):
    flags = ["--model", toy_gguf, "--served-model-name", "toy", "--speculative", "ngram", "--port", "0"]
    with glm_serve(*flags) as server:
        server.wait_ready(120)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            yield client


def chat(client, **fields):
    messages = [{"role": "user", "content": "裙子" * 30}]
    return client.chat.completions.create(model="toy", messages=messages, temperature=0, max_tokens=60, **fields)


def test_a_stream_equals_the_complete_response_with_speculation(speculative):
    complete = chat(speculative)
    chunks = list(chat(speculative, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == (
        complete.choices[0].message.content
    )
    assert chunks[-1].usage == complete.usage
    assert complete.usage.completion_tokens == 60


def test_logprobs_are_rejected_by_name_with_speculation(speculative):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(speculative, logprobs=True)
    assert (caught.value.param, caught.value.code) == ("logprobs", "unsupported_parameter")
