"""The profile `embeddings` serves a GGUF file of the user on its own port, without a chat model."""

import shutil

import numpy as np
import openai
import pytest

pytestmark = pytest.mark.timeout(300)


def test_the_profile_serves_the_embeddings_of_a_file(make_project, embedding_model, tmp_path):
    tmp_path.chmod(0o755)
    folder = tmp_path / "folders"
    folder.mkdir(mode=0o755)
    shutil.copy(embedding_model.file, folder / "tiny.gguf")
    project = make_project("embeddings", FOLDERS_DIR=folder, EMBEDDINGS="tiny.gguf")
    project.compose("up", "--detach", "--wait", "--no-build")
    url = f"http://127.0.0.1:{project.environment['EMBEDDINGS_PORT']}/v1"
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        (found,) = client.embeddings.create(model="tiny", input="北京天气").data
        expected = embedding_model.vector(embedding_model.ids("北京天气"))
        assert np.dot(found.embedding, expected) > 0.999
        with pytest.raises(openai.NotFoundError, match="no chat model"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])
