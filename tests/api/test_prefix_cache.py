"""`glm serve --warm FILE --prefix-cache DIR`, through the API and over a restart."""

import json
import shutil

import openai
import pytest

from entrypoints.api.auth import digest
from entrypoints.checkpoint.manifest import write_file_record

SYSTEM = {"role": "system", "content": "你是一名导购，请简短回答。" * 8}


@pytest.fixture
def flags(toy_gguf, tmp_path):
    model = tmp_path / "toy.gguf"
    shutil.copy(toy_gguf, model)
    write_file_record(model, model)
    (tmp_path / "keys").write_text("".join(f"{name} {digest(name)}\n" for name in ("alice", "bob")))
    (tmp_path / "warm.jsonl").write_text(json.dumps({"messages": [SYSTEM]}) + "\n", encoding="utf-8")
    return [
        *("--model", model, "--served-model-name", "toy", "--api-keys-file", tmp_path / "keys", "--port", "0"),
        *("--warm", tmp_path / "warm.jsonl", "--prefix-cache", tmp_path / "cache"),
    ]


def chat(server, key, question):
    messages = [SYSTEM, {"role": "user", "content": question}]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
        reply = client.chat.completions.create(model="toy", messages=messages, temperature=0, max_tokens=20)
    return reply.choices[0].message.content


def owners(tmp_path):
    """Owner of each state, with the number of its tokens."""
    records = [json.loads(file.read_text()) for file in (tmp_path / "cache").glob("*/*.json")]
    return sorted((record["owner"], len(record["tokens"])) for record in records)


@pytest.mark.slow
def test_conversations_of_two_keys_are_kept_apart_over_a_restart(glm_serve, flags, tmp_path):
    question = "裙子" * 40
    with glm_serve(*flags) as server:
        server.wait_ready(120)
        warmed = owners(tmp_path)
        answers = [chat(server, key, question) for key in ("alice", "bob", "alice")]
        server.signal()
        assert server.wait() == 0
    assert len(warmed) == 1
    assert len(set(answers)) == 1
    kept = owners(tmp_path)
    assert len({owner for owner, _ in kept}) == 3  # the operator, alice, bob
    assert warmed[0] in kept
    with glm_serve(*flags) as server:
        server.wait_ready(120)
        assert chat(server, "bob", question) == answers[0]
        assert "1 prompts of --warm read in" in server.log
