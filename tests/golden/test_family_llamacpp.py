"""llama.cpp with the tiny checkpoints of the related families: generated ids, and the ids that its stream withholds."""

import pytest
from safetensors.torch import load_file

from entrypoints.chat_format.answer_parser import decode
from entrypoints.chat_format.prompt import Message
from entrypoints.chat_format.sampling import Sampling
from entrypoints.checkpoint.conversion import convert_to_native, original_format
from entrypoints.engines.llamacpp.engine import LlamaCppEngine
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.quantization.gguf_writer import write_gguf

GREEDY = Sampling(temperature=0, max_new_tokens=24)


@pytest.fixture(scope="module", params=["chatglm2-tiny", "chatglm2-32k-tiny", "glm4-tiny"])
def case(request, golden_family, tmp_path_factory):
    """The converted folder, llama.cpp with its file in half precision, and the values of the reference."""
    folder = tmp_path_factory.mktemp("gguf")
    source = golden_family / request.param
    convert_to_native(source, folder / "native", original_format(source))
    write_gguf(folder / "native", folder / "model.gguf", "f16")
    engine = LlamaCppEngine.load(folder / "model.gguf", EngineOptions(slots=1, threads=1))
    yield folder / "native", engine, load_file(golden_family / f"{request.param}.expected.safetensors")
    engine.close()


def until_stop(ids, engine):
    stops = [place for place, id_ in enumerate(ids) if id_ in engine.tokenizer.stop_ids]
    return ids[: stops[0]] if stops else ids


@pytest.mark.slow
def test_greedy_ids_are_those_of_the_reference(case):
    """Every step has a margin of 0.006 or more, which half precision does not reach."""
    _, engine, expected = case
    names = [key.removesuffix(".greedy") for key in expected if key.endswith(".greedy")]
    assert {"short", "multi"} <= set(names)
    for name in names:
        prompt, greedy = (expected[f"{name}.{key}"].flatten().tolist() for key in ("input_ids", "greedy"))
        assert list(map(int, engine.generate(prompt, GREEDY))) == until_stop(greedy, engine)


@pytest.mark.slow
def test_transformers_streams_the_same_greedy_ids(case):
    folder, engine, expected = case
    reference = TransformersEngine.load(folder, EngineOptions(device="cpu", dtype="float32"))
    for name in ("short", "multi"):
        prompt, greedy = (expected[f"{name}.{key}"].flatten().tolist() for key in ("input_ids", "greedy"))
        assert list(map(int, reference.generate(prompt, GREEDY))) == until_stop(greedy, engine)


def test_every_id_of_a_text_of_emoji_is_reported_with_its_bytes(case):
    """Emoji of several tokens, whose first ones the stream of llama.cpp does not name."""
    _, engine, _ = case
    prompt = engine.prompt_format.encode([Message("user", "hi")], engine.tokenizer)
    text = "👋🦜 你好🙂🏽"
    sampling = Sampling(temperature=0, max_new_tokens=60, grammar=f'root ::= "{text}"')
    ids = list(map(int, engine.generate(prompt, sampling)))
    assert decode(ids, engine.tokenizer) == text
    assert engine.tokenizer.pad_id not in ids
    assert b"".join(map(engine.tokenizer.token_bytes, ids)).strip() == text.encode()
