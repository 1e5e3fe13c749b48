"""llama.cpp with the tiny checkpoint of the reference data: generated ids, tokenizer, prompts."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import xllamacpp
from safetensors.torch import load_file

from entrypoints.chat_format.sampling import Sampling
from entrypoints.checkpoint.gguf_reader import GgufCheckpoint, open_gguf
from entrypoints.engines.llamacpp.engine import LlamaCppEngine
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.families import CHATGLM3
from entrypoints.quantization.gguf_writer import write_gguf

PROMPTS = ("short", "multi", "tools")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def files(golden_native, folder) -> dict[str, Path]:
    """The checkpoint in each type."""
    paths = {type_: folder / f"{type_}.gguf" for type_ in ("f16", "q8_0", "q4_0")}
    for type_, path in paths.items():
        write_gguf(golden_native, path, type_)
    return paths


@pytest.fixture(scope="module")
def checkpoint(files) -> GgufCheckpoint:
    return open_gguf(files["f16"])


@pytest.fixture(scope="module")
def expected(golden) -> dict:
    return load_file(golden / "original-tiny.expected.safetensors")


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_greedy_ids_are_those_of_the_reference(files, expected, golden_native, same_but_for_ties):
    """In half precision; up to the first position where the top two logits of transformers differ by less than 0.01."""
    reference = TransformersEngine.load(golden_native, EngineOptions(device="cpu", dtype="float32"))
    engine = LlamaCppEngine.load(files["f16"], EngineOptions(slots=1, threads=2))
    sampling = Sampling(max_new_tokens=24, temperature=0)
    for name in PROMPTS:
        prompt, greedy = expected[f"{name}.input_ids"][0].tolist(), expected[f"{name}.greedy"][0].tolist()
        same_but_for_ties(list(map(int, engine.generate(prompt, sampling))), greedy, reference.model, prompt, sampling)
    engine.close()


@pytest.mark.parametrize("type_", ["q8_0", "q4_0"])
def test_quantized_files_answer_every_prompt(type_, files, expected):
    engine = LlamaCppEngine.load(files[type_], EngineOptions(slots=3, threads=2))
    prompts = [expected[f"{name}.input_ids"][0].tolist() for name in PROMPTS]
    answers = engine.generate_batch(prompts, Sampling(max_new_tokens=24, temperature=0))
    assert [len(answer) for answer in answers] == [24, 24, 24]
    engine.close()


def test_the_tokenizer_of_the_file_gives_the_references_ids(checkpoint, golden):
    rows = lines(golden / "text_ids.jsonl")
    assert len(rows) == 3453
    assert [row["text"] for row in rows if checkpoint.tokenizer.encode(row["text"]) != row["ids"]] == []


def test_the_prompt_format_of_the_file_gives_the_references_prompts(checkpoint, golden):
    rows = lines(golden / "chat_ids.jsonl")
    assert len(rows) == 44
    encode = checkpoint.prompt_format.encode
    assert [row["ids"] for row in rows if encode(row["messages"], checkpoint.tokenizer) != row["ids"]] == []


@pytest.fixture(scope="module")
def stock(files, folder) -> Iterator[httpx2.Client]:
    """llama.cpp's own server: its tokenizer and its rendering of the chat template."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.verbosity = str(files["f16"]), 512, 0
    params.hostnames = [str(folder / "stock.sock")]
    server = xllamacpp.Server(params)
    with httpx2.Client(transport=httpx2.HTTPTransport(uds=params.hostnames[0]), base_url="http://llama") as client:
        yield client
    del server


def test_stock_llama_cpp_tokenizes_as_the_reference(stock, golden):
    """A third of the rows; all 3,453 were equal when this test was written."""
    rows = lines(golden / "text_ids.jsonl")[::3]
    assert len(rows) == 1151
    for row in rows:
        answer = stock.post("/tokenize", json={"content": row["text"], "parse_special": False})
        assert answer.json()["tokens"] == row["ids"], row["text"]


def test_stock_llama_cpp_renders_the_references_prompts(stock, golden):
    """Except tools inside a message, which it drops, and names of special tokens, which the template rejects."""
    same = 0
    for row in lines(golden / "chat_ids.jsonl"):
        texts = json.dumps(row["messages"], ensure_ascii=False)
        rendered = stock.post("/apply-template", json={"messages": row["messages"]})
        if any(name in texts for name in CHATGLM3.special_tokens):
            assert rendered.status_code == 400
        elif not any(message.get("tools") for message in row["messages"]):
            content = {"content": rendered.json()["prompt"], "parse_special": True}
            assert stock.post("/tokenize", json=content).json()["tokens"] == row["ids"]
            same += 1
    assert same == 40
