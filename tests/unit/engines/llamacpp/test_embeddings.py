"""Embeddings on llama.cpp are those of transformers; too long and invalid inputs are errors."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from embedding_models import CONTEXT, SIZE, write_bert, write_qwen3

from entrypoints.checkpoint.embedding_gguf import open_embedding_gguf
from entrypoints.engines.llamacpp import embeddings
from entrypoints.engines.llamacpp.embeddings import EmbeddingEngine, InputTooLong
from entrypoints.errors import UserError

TEXTS = [
    "北京天气", "上海", "你好，裙子。", "裙" * (CONTEXT - 2), "Workers working", "北京2024年", "Café", "a,b.",
    "50% (ab)", "  work\n a ", "不认识的字", "x\u200ba", "👋",
]  # fmt: skip


@pytest.fixture(scope="module")
def engine(embedding_model):
    engine = EmbeddingEngine.load(embedding_model.file)
    yield engine
    engine.close()


def cosine(one, other):
    return np.dot(one, other) / np.linalg.norm(one) / np.linalg.norm(other)


def test_vectors_equal_those_of_transformers(engine, embedding_model):
    """Texts through llama.cpp's tokenizer against those through the tokenizer of transformers, and ids."""
    for text in TEXTS:
        found, ids = engine.embed(text), embedding_model.ids(text)
        assert found.tokens == len(ids), text
        assert cosine(found.vector, embedding_model.vector(ids)) > 0.99999, text
        assert cosine(engine.embed(ids).vector, found.vector) > 0.99999, text
        assert (len(found.vector), np.linalg.norm(found.vector)) == (SIZE, pytest.approx(1, abs=1e-5))
    assert cosine(engine.embed(TEXTS[0]).vector, engine.embed(TEXTS[1]).vector) < 0.99, "different texts differ"


def test_the_declared_pooling_is_used(tmp_path):
    for model in (write_bert(tmp_path / "cls.gguf", "北京", "cls"), write_qwen3(tmp_path / "last.gguf")):
        engine = EmbeddingEngine.load(model.file)
        for ids in ([2, 5, 6, 3], [4, 3, 2, 1, 0, 6], [5] * (CONTEXT - 1)):
            assert cosine(engine.embed(ids).vector, model.vector(ids)) > 0.9999, (model.pooling, ids)
        engine.close()


def test_concurrent_vectors_equal_sequential_ones(engine):
    sequential = [engine.embed(text).vector for text in TEXTS]
    with ThreadPoolExecutor(8) as pool:
        concurrent = list(pool.map(lambda text: engine.embed(text).vector, TEXTS * 4))
    for number, vector in enumerate(concurrent):
        assert cosine(vector, sequential[number % len(TEXTS)]) > 0.99999


@pytest.mark.parametrize("kind", ["text", "ids"])
def test_an_input_above_the_limit_is_reported_with_its_length(engine, embedding_model, kind):
    text = "裙" * (CONTEXT - 1)
    with pytest.raises(InputTooLong) as caught:
        engine.embed(text if kind == "text" else embedding_model.ids(text))
    assert caught.value.problem == f"the input has {CONTEXT + 1} tokens, the limit is {CONTEXT}"
    assert engine.embed("你好").tokens == 4, "the engine still works"


def test_a_decoder_leaves_one_token_of_its_context_free(tmp_path):
    engine = EmbeddingEngine.load(write_qwen3(tmp_path / "model.gguf").file)
    assert (engine.max_tokens, engine.slots) == (CONTEXT - 1, 1)
    with pytest.raises(InputTooLong):
        engine.embed([1] * CONTEXT)
    engine.close()


def test_ids_that_the_model_does_not_have_are_rejected(engine):
    with pytest.raises(UserError, match="invalid tokens"):
        engine.embed([10_000])


def test_a_closed_engine_is_not_used(embedding_model):
    engine = EmbeddingEngine.load(embedding_model.file)
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.embed("你好")
    engine.close()


def test_short_memory_is_reported_before_loading(embedding_model, monkeypatch):
    monkeypatch.setattr(embeddings, "available_memory", lambda: 100_000)
    with pytest.raises(UserError, match=r" (bytes|[kM]B) are available"):
        EmbeddingEngine.load(embedding_model.file)


def test_the_memory_of_a_decoder_grows_with_its_kv_cache(tmp_path, embedding_model):
    """The numbers of the tiny models by hand: 2 layers, 2 KV heads of 16 dimensions, keys and values in float16."""
    decoder = open_embedding_gguf(write_qwen3(tmp_path / "model.gguf").file)
    assert decoder.cache_bytes == 2 * 2 * (2 * 16) * 2
    assert open_embedding_gguf(embedding_model.file).cache_bytes == 0
    assert embeddings.needed_bytes(decoder) > decoder.file.stat().st_size + 96 * decoder.cache_bytes
