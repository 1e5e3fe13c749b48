"""Folders of GLM-4 that are native already: checked, copied, and given the exact tokenizer."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import models

from entrypoints.__main__ import main
from entrypoints.checkpoint import tiktoken_vocabulary
from entrypoints.checkpoint.adoption import adopt_native, is_foreign_native
from entrypoints.checkpoint.conversion import convert_to_native, original_format
from entrypoints.checkpoint.native import open_native
from entrypoints.checkpoint.tokenizer import with_special_tokens
from entrypoints.errors import UserError
from entrypoints.families import GLM4
from entrypoints.hub.model_store import PrepareOptions, prepare_model

TOKENS = [bytes([value]) for value in range(256)] + [b"he", b"ll", b"hell", b"hello"]
CONFIG = {
    "architectures": ["GlmForCausalLM"],
    "attention_bias": True,
    "eos_token_id": [260, 267, 269],
    "head_dim": 8,
    "hidden_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
    "model_type": "glm",
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "pad_token_id": 260,
    "rms_norm_eps": 1.5625e-07,
    "rope_theta": 5000000.0,  # where older releases of transformers wrote it
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 288,
}


@pytest.fixture
def folder(tmp_path):
    """A folder as transformers saves one, with one merge for each token."""
    import transformers

    target = tmp_path / "hf"
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5}
    known = {key: value for key, value in CONFIG.items() if key not in ("rope_theta", "torch_dtype")}
    config = transformers.GlmConfig(**known, rope_parameters=rope)
    transformers.GlmForCausalLM(config).bfloat16().save_pretrained(target)
    (target / "config.json").write_text(json.dumps(CONFIG))
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": CONFIG["eos_token_id"]}))
    names = [tiktoken_vocabulary.name_of(token) for token in TOKENS]
    backend = with_special_tokens(tiktoken_vocabulary.from_ranks(TOKENS, "test"), GLM4)
    backend.model = models.BPE({name: id_ for id_, name in enumerate(names)}, [("h", "e")])
    backend.save(str(target / "tokenizer.json"))
    return target


def test_an_adopted_folder_has_the_same_tensors_and_the_exact_tokenizer(folder, tmp_path, capsys):
    assert is_foreign_native(folder)
    assert main(["convert", str(folder), str(tmp_path / "native")]) == 0
    checkpoint = open_native(tmp_path / "native", verify=True)
    assert (checkpoint.prompt_format.family, checkpoint.prompt_format.template) == ("glm4", "glm4")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "native"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert checkpoint.model_config.rope_ratio == 500
    assert checkpoint.tokenizer.encode("hello") == [259]  # the saved merges alone make five tokens of it
    assert checkpoint.tokenizer.stop_ids == (260, 267, 269)
    assert not is_foreign_native(tmp_path / "native")


@pytest.mark.parametrize("command", ["convert", "prepare"])
def test_family_must_agree_with_the_vocabulary_of_a_native_folder(command, folder, tmp_path, capsys):
    arguments = [command, str(folder), str(tmp_path / "target"), "--family"]
    assert main([*arguments, "chatglm3"]) == 1
    assert "has the vocabulary of GLM-4-9B, not of chatglm3; omit --family" in capsys.readouterr().err
    assert main([*arguments, "glm4"]) == 0


def test_an_adopted_folder_converts_to_the_original_layout_and_back(folder, tmp_path):
    adopt_native(folder, tmp_path / "native")
    assert main(["convert", str(tmp_path / "native"), str(tmp_path / "original"), "--to", "original"]) == 0
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    assert (config["rope_ratio"], config["eos_token_id"], config["pad_token_id"]) == (500, [260, 267, 269], 260)
    convert_to_native(tmp_path / "original", tmp_path / "again", original_format(tmp_path / "original"))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("native", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "native" / "tokenizer.json").read_text() == (tmp_path / "again" / "tokenizer.json").read_text()


def test_the_model_store_adopts_it_too(folder, tmp_path):
    options = PrepareOptions(settings=None, create_demo=None, merge=None)
    (tmp_path / "store").mkdir()
    assert open_native(prepare_model(tmp_path / "store", str(folder), options)).prompt_format.family == "glm4"


def change(folder, name, **fields):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | fields))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("config.json", {"partial_rotary_factor": 1.0}, "rope_parameters.partial_rotary_factor=1.0"),
        ("config.json", {"intermediate_size": 25}, "mlp"),
        ("config.json", {"vocab_size": 287}, "embed_tokens"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"x": 5}, "merges": []}}, "is not a vocabulary of GLM-4"),
    ],
)
def test_a_folder_of_another_model_is_rejected_by_name(name, fields, message, folder, tmp_path):
    change(folder, name, **fields)
    with pytest.raises(UserError, match=message):
        adopt_native(folder, tmp_path / "native")
    assert not (tmp_path / "native").exists()
