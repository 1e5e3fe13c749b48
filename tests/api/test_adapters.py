"""Adapters by name beside their base, on the reference's tiny checkpoint."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from entrypoints.checkpoint.adapters import convert_adapter
from entrypoints.prompt import PromptFormat

CHAT = "/v1/chat/completions"
NAMES = ("original-tiny-lora", "original-tiny-ptuning", "original-tiny-ptuning-mlp")
QUESTIONS = ("你好", "类型#裙", "介绍一下")


@pytest.fixture(scope="module")
def adapted(golden, golden_native, glm_serve, tmp_path_factory):
    """The base as `base`, and the three adapters under their own names."""
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


def test_adapters_are_models_with_the_base_as_parent(adapted):
    models = json.loads(adapted.request("GET", "/v1/models")[2])["data"]
    assert [(model["id"], model["parent"]) for model in models] == [("base", None), *((name, "base") for name in NAMES)]
    body = {"model": NAMES[0], "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert adapted.post(CHAT, body)["model"] == NAMES[0]


def test_every_adapter_answers_otherwise_than_its_base(adapted):
    """B6: an adapter is never dropped in silence."""
    answers = {name: [answer(adapted, name, question) for question in QUESTIONS] for name in ("base", *NAMES)}
    assert len({tuple(found) for found in answers.values()}) == 4, answers


def test_concurrent_answers_of_base_and_adapters_equal_serial_ones(adapted):
    asked = [(name, question) for question in QUESTIONS for name in ("base", *NAMES)]
    serial = [answer(adapted, *one) for one in asked]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda one: answer(adapted, *one), asked)) == serial
