"""GGUF files of embedding models: what can be checked before they are loaded."""

import gguf
import pytest

from entrypoints.checkpoint.embedding_gguf import open_embedding_gguf
from entrypoints.checkpoint.gguf_reader import open_gguf
from entrypoints.errors import UserError


def write(file, architecture="bert", **values):
    """A file without tensors; a value of None is left out."""
    defaults = {
        "pooling_type": 2, "context_length": 512, "embedding_length": 64, "block_count": 2, "attention.head_count": 4,
        "attention.causal": False,
    }  # fmt: skip
    writer = gguf.GGUFWriter(file, architecture)
    for name, value in {**defaults, **values}.items():
        if isinstance(value, bool):
            writer.add_bool(f"{architecture}.{name}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{architecture}.{name}", value)
        elif isinstance(value, str):
            writer.add_string(f"{architecture}.{name}", value)
    writer.add_token_list(["a", "b", "c"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_the_properties_of_a_file_are_read(tmp_path):
    checkpoint = open_embedding_gguf(write(tmp_path / "model.gguf"))
    assert (checkpoint.pooling, checkpoint.context_length, checkpoint.size) == ("cls", 512, 64)
    assert (checkpoint.vocab_size, checkpoint.is_causal) == (3, False)
    assert open_embedding_gguf(write(tmp_path / "decoder.gguf", "qwen3", **{"attention.causal": None})).is_causal


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"pooling_type": None}, "(bert) declares no pooling to a vector"),
        ({"pooling_type": 0}, "(bert) declares no pooling to a vector"),
        ({"pooling_type": 4}, "(bert) declares no pooling to a vector"),
        ({"pooling_type": 9}, "bert.pooling_type is 9"),
        ({"context_length": None}, "lacks 'bert.context_length'"),
        ({"context_length": 0}, "bert.context_length is 0"),
        ({"embedding_length": "64"}, "bert.embedding_length is '64'"),
        ({"attention.causal": True, "block_count": 10**6}, "bert.block_count is 1000000"),
    ],
)
def test_a_file_that_is_no_embedding_model_is_rejected_by_name(tmp_path, values, problem):
    with pytest.raises(UserError) as caught:
        open_embedding_gguf(write(tmp_path / "model.gguf", **values))
    assert problem in caught.value.problem


def test_the_chat_model_is_no_embedding_model_and_the_other_way_round(toy_gguf, embedding_model):
    with pytest.raises(UserError, match="declares no pooling"):
        open_embedding_gguf(toy_gguf)
    with pytest.raises(UserError, match="glm serve --embeddings"):
        open_gguf(embedding_model.file)


def test_a_missing_a_foreign_and_a_truncated_file_are_rejected(tmp_path, embedding_model):
    with pytest.raises(UserError, match="file not found"):
        open_embedding_gguf(tmp_path / "absent.gguf")
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(UserError, match="is not a GGUF file"):
        open_embedding_gguf(tmp_path / "text.gguf")
    (tmp_path / "cut.gguf").write_bytes(embedding_model.file.read_bytes()[:-5000])
    with pytest.raises(UserError, match="is truncated"):
        open_embedding_gguf(tmp_path / "cut.gguf")
