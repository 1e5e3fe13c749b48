"""`glm serve --speculative ngram`, through the API."""

import openai
import pytest


@pytest.fixture(scope="module")
def drafting(glm_serve, toy_gguf):
    flags = ["--model", toy_gguf, "--served-model-name", "toy", "--speculative", "ngram", "--port", "0"]
    with glm_serve(*flags) as server:
        server.wait_ready(120)
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client, **fields):
    messages = [{"role": "user", "content": "裙子" * 30}]
    return client.chat.completions.create(model="toy", messages=messages, temperature=0, max_tokens=60, **fields)


def test_a_stream_equals_the_whole_with_drafts_too(drafting):
    whole = ask(drafting)
    chunks = list(ask(drafting, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == (
        whole.choices[0].message.content
    )
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 60


def test_logprobs_are_refused_by_name_while_drafting(drafting):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(drafting, logprobs=True)
    assert (refused.value.param, refused.value.code) == ("logprobs", "unsupported_parameter")
