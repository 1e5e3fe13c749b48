"""Opening a converted folder, which needs no other file and no network."""

import json
import shutil
import subprocess
import sys

import pytest
import tokenizers
import torch
import transformers

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.chat_format.sampling import Sampling
from entrypoints.checkpoint.native import copy_vocabulary, model_files, open_native, write_prompt_format
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.errors import UserError

GREEDY = Sampling(temperature=0, max_new_tokens=8)


@pytest.fixture
def folder(toy_native, tmp_path):
    """A copy of the native tiny model that a test may damage."""
    return shutil.copytree(toy_native, tmp_path / "native")


def edit(folder, **changed):
    """Change fields of config.json and remove the manifest, which would detect it."""
    (folder / "manifest.json").unlink()
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def test_a_folder_saved_by_transformers_is_loaded_without_its_base(folder, toy_engine, tmp_path):
    """Model and tokenizer as the Trainer saves them, with the base removed."""
    saved, ids = tmp_path / "saved", [300, 301, 302]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(saved)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(saved)
    shutil.rmtree(folder)
    engine = TransformersEngine.load(saved, EngineOptions(device="cpu", dtype="float32"))
    assert list(engine.generate(ids, GREEDY)) == list(toy_engine.generate(ids, GREEDY))
    assert engine.tokenizer.encode("裙子") == toy_engine.tokenizer.encode("裙子")
    assert engine.prompt_format == PromptFormat()


def test_the_model_files_are_sufficient_for_loading(folder, toy_engine, tmp_path):
    (folder / "trainer_state.json").write_text("{}")
    (folder / "optimizer.pt").write_text("")
    (tmp_path / "copied").mkdir()
    for file in model_files(folder):
        shutil.copy(file, tmp_path / "copied")
    assert not (tmp_path / "copied" / "optimizer.pt").exists()
    engine = TransformersEngine.load(tmp_path / "copied", EngineOptions(device="cpu", dtype="float32"))
    assert list(engine.generate([300], GREEDY)) == list(toy_engine.generate([300], GREEDY))


OFFLINE = """
import socket, sys

def refuse(*args, **kwargs):
    raise AssertionError(f"a connection was attempted: {args}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
from pathlib import Path
from entrypoints import EngineOptions, load_chat
from entrypoints.__main__ import main

source, target = sys.argv[1:]
assert main(["convert", source, target]) == 0
assert main(["verify", target]) == 0
answer, history = load_chat(target, EngineOptions(device="cpu", dtype="float32")).chat("你好", max_new_tokens=3, seed=0)
print(len(history))
"""


@pytest.mark.slow
def test_converting_loading_and_answering_need_no_network(toy_original, tmp_path):
    """In a new process in which every connection raises."""
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, toy_original, tmp_path / "native"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "2"


def test_opening_gives_dimensions_vocabulary_and_prompt_format(folder, toy_tokenizer):
    write_prompt_format(folder, PromptFormat("round", "P"))
    (folder / "manifest.json").unlink()
    opened = open_native(folder)
    assert (
        opened.model_config.num_layers,
        opened.model_config.hidden_size,
        opened.model_config.context_length,
        opened.model_config.rope_ratio,
    ) == (4, 256, 1024, 1)
    assert opened.prompt_format == PromptFormat("round", "P")
    assert opened.tokenizer.size == toy_tokenizer.size
    assert len(opened.files.tensors) == 3 + 4 * 11


def test_a_folder_without_a_prompt_format_uses_chatglm3s_own(folder):
    (folder / "prompt.json").unlink()
    (folder / "manifest.json").unlink()
    assert open_native(folder).prompt_format == PromptFormat()


@pytest.mark.parametrize("content", ["{", "[]", '{"template": "x"}', '{"temperature": 1}'])
def test_an_invalid_prompt_format_is_rejected(content, folder):
    (folder / "prompt.json").write_text(content)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"prompt\.json|template"):
        open_native(folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "llama"}, "has model_type 'llama'"),
        ({"model_type": "chatglm"}, "in the original layout; convert it first"),
        ({"rope_parameters": None}, "lacks"),
        ({"num_hidden_layers": 3}, "unexpected: model.layers.3"),
        ({"num_hidden_layers": 5}, "missing: model.layers.4"),
        ({"head_dim": 64}, "of the wrong shape"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_config_that_does_not_match_the_weights_is_rejected(changed, message, folder):
    edit(folder, **changed)
    with pytest.raises(UserError, match=message):
        open_native(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("manifest", [True, False])
def test_a_missing_file_is_named_with_or_without_a_manifest(name, manifest, folder):
    (folder / name).unlink()
    if not manifest:
        (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=f"{name}|contains no weights"):
        open_native(folder)


def test_a_truncated_file_is_found_without_reading_the_weights(folder):
    """By its size."""
    complete = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(complete[:-1])
    with pytest.raises(UserError, match=rf"model\.safetensors has {len(complete) - 1} bytes, not {len(complete)}"):
        open_native(folder)


def test_a_flipped_bit_is_found_only_with_verify(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert open_native(folder).model_config.num_layers == 4
    with pytest.raises(UserError, match=r"model\.safetensors does not match its SHA-256"):
        open_native(folder, verify=True)


def test_a_vocabulary_larger_than_the_embedding_is_rejected_with_both_sizes(folder):
    """A tokenizer.json copied from another checkpoint: its last ids have no embedding."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"extra{number}" for number in range(100)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json has 2509 ids, config\.json 2432"):
        open_native(folder)


def test_verify_requires_a_manifest(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"contains no manifest\.json"):
        open_native(folder, verify=True)


def test_a_missing_folder_is_named_with_flag_and_variable(tmp_path):
    with pytest.raises(UserError, match=r"folder not found: .*nothing.*--model, MODEL_PATH"):
        open_native(tmp_path / "nothing")


def test_both_vocabulary_files_are_copied_if_present(folder, tmp_path):
    for expected in (["tokenizer.json", "tokenizer.model"], ["tokenizer.json"]):
        target = tmp_path / str(len(expected))
        target.mkdir()
        copy_vocabulary(folder, target)
        assert sorted(file.name for file in target.iterdir()) == expected
        (folder / "tokenizer.model").unlink(missing_ok=True)
