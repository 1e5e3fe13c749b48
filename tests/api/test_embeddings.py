"""/v1/embeddings of `glm serve`, beside a chat model and alone, through OpenAI's client."""

from pathlib import Path

import numpy as np
import openai
import pytest
from embedding_models import CONTEXT


def client_of(server):
    return openai.OpenAI(base_url=f"{server.wait_ready().url}/v1", api_key="unused", max_retries=0)


@pytest.mark.slow
def test_both_models_of_a_server_answer(glm_serve, toy_gguf, embedding_model):
    with glm_serve("--model", toy_gguf, "--embeddings", embedding_model.file) as server, client_of(server) as client:
        assert [model.id for model in client.models.list()] == ["toy", "bert"]
        texts = ["北京天气", "你好", "裙子"]
        for fields in ({}, {"encoding_format": "float"}):  # the client's default is base64, which it decodes
            found = client.embeddings.create(model="bert", input=texts, **fields)
            for text, one in zip(texts, found.data, strict=True):
                assert np.dot(one.embedding, embedding_model.vector(embedding_model.ids(text))) > 0.9999
            assert found.usage.prompt_tokens == sum(len(embedding_model.ids(text)) for text in texts)
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model="bert", input=["你好", "裙" * CONTEXT])
        assert (caught.value.param, caught.value.code) == ("input.1", "context_length_exceeded")
        assert f"the input has {CONTEXT + 2} tokens, the limit is {CONTEXT}" in str(caught.value)
        chat = client.chat.completions.create(model="toy", messages=[{"role": "user", "content": "x"}], max_tokens=2)
        assert chat.usage.completion_tokens == 2
        server.signal()
        assert server.wait() == 0
        assert "Traceback" not in server.log


@pytest.mark.slow
def test_embeddings_alone_need_no_torch_and_no_chat_model(glm_serve, embedding_model):
    alone = glm_serve("--embeddings", embedding_model.file, "--served-embeddings-name", "bge")
    with alone as server, client_of(server) as client:
        assert client.embeddings.create(model="bge", input="你好").usage.total_tokens == 4
        with pytest.raises(openai.NotFoundError, match="this server has no chat model"):
            client.chat.completions.create(model="bge", messages=[{"role": "user", "content": "x"}])
        maps = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert "libtorch" not in maps
