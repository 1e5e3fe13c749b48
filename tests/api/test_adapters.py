"""Adapters selected by name, on the tiny checkpoint of the reference data."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.checkpoint.adapters import convert_adapter

CHAT = "/v1/chat/completions"
NAMES = ("original-tiny-lora", "original-tiny-ptuning", "original-tiny-ptuning-mlp")
QUESTIONS = ("你好", "类型#裙", "介绍一下")


@pytest.fixture(scope="module")
def adapted(golden, golden_native, glm_serve, tmp_path_factory):
    """The base model as `base`, and the three adapters under their own names."""
    folder, flags = tmp_path_factory.mktemp("adapters"), []
    for name in NAMES:
        convert_adapter(golden / name, folder / name, golden_native, PromptFormat())
        flags += ["--adapter", f"{name}={folder / name}"]
    model = ["--model", golden_native, "--served-model-name", "base", "--dtype", "float32"]
    with glm_serve(*model, *flags) as server:
        yield server.wait_ready()


def answer(server, model, question, **fields):
    body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 16}
    return server.post(CHAT, {**body, **fields})["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def sequential(adapted):
    """Answers of every model to every question, one at a time."""
    return {(name, question): answer(adapted, name, question) for question in QUESTIONS for name in ("base", *NAMES)}


@pytest.mark.slow
def test_adapters_are_listed_with_the_base_model_as_parent(adapted):
    models = json.loads(adapted.request("GET", "/v1/models")[2])["data"]
    assert [(model["id"], model["parent"]) for model in models] == [("base", None), *((name, "base") for name in NAMES)]
    body = {"model": NAMES[0], "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert adapted.post(CHAT, body)["model"] == NAMES[0]


def test_the_answers_of_every_adapter_have_the_response_format(adapted):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    response_format = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for name in ("base", *NAMES):
        found = answer(adapted, name, QUESTIONS[0], response_format=response_format, max_tokens=60)
        assert json.loads(found) in ({"ok": True}, {"ok": False}), name


@pytest.mark.slow
def test_every_adapter_changes_the_answers(sequential):
    """An adapter must never be ignored silently."""
    answers = {tuple(sequential[name, question] for question in QUESTIONS) for name in ("base", *NAMES)}
    assert len(answers) == 4, sequential


def test_concurrent_answers_of_base_and_adapters_equal_sequential_ones(adapted, sequential):
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda key: answer(adapted, *key), sequential)) == list(sequential.values())
