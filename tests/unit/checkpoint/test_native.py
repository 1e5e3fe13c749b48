"""A converted folder: how it is opened, and that it needs nothing but itself. Traps: see the reported pains."""

import json
import shutil
import subprocess
import sys

import pytest
import tokenizers
import torch
import transformers

from entrypoints.checkpoint.native import copy_vocabulary, model_files, open_native, write_prompt_format
from entrypoints.engines.transformers_engine import TransformersEngine
from entrypoints.errors import UserError
from entrypoints.prompt import PromptFormat
from entrypoints.sampling import Sampling

GREEDY = Sampling(temperature=0, max_new_tokens=8)


@pytest.fixture
def folder(toy_native, tmp_path):
    """A copy of the native toy to spoil."""
    return shutil.copytree(toy_native, tmp_path / "native")


def edit(folder, **changed):
    """Change fields of config.json and forget the manifest, which would notice."""
    (folder / "manifest.json").unlink()
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def test_a_folder_that_transformers_saved_again_is_loaded_from_itself_alone(folder, toy_engine, tmp_path):
    """A6: model and tokenizer as a Trainer saves them, the base moved away, one generation."""
    saved, ids = tmp_path / "saved", [300, 301, 302]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(saved)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(saved)
    shutil.rmtree(folder)
    engine = TransformersEngine.load(saved, device="cpu", dtype="float32")
    assert list(engine.generate(ids, GREEDY)) == list(toy_engine.generate(ids, GREEDY))
    assert engine.tokenizer.encode("裙子") == toy_engine.tokenizer.encode("裙子")
    assert engine.prompt_format == PromptFormat()


def test_the_model_files_are_all_that_loading_needs(folder, toy_engine, tmp_path):
    (folder / "trainer_state.json").write_text("{}")
    (folder / "optimizer.pt").write_text("")
    (tmp_path / "copied").mkdir()
    for file in model_files(folder):
        shutil.copy(file, tmp_path / "copied")
    assert not (tmp_path / "copied" / "optimizer.pt").exists()
    engine = TransformersEngine.load(tmp_path / "copied", device="cpu", dtype="float32")
    assert list(engine.generate([300], GREEDY)) == list(toy_engine.generate([300], GREEDY))


OFFLINE = """
import socket, sys

def refuse(*args, **kwargs):
    raise AssertionError(f"a connection was attempted: {args}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
from pathlib import Path
from entrypoints import load_chat
from entrypoints.__main__ import main

source, target = sys.argv[1:]
assert main(["convert", source, target]) == 0
assert main(["verify", target]) == 0
answer, history = load_chat(target, device="cpu", dtype="float32").chat("你好", max_new_tokens=3, seed=0)
print(len(history))
"""


def test_nothing_is_fetched_to_convert_load_and_answer(toy_original, tmp_path):
    """B4: every connection of a fresh process would raise."""
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, toy_original, tmp_path / "native"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "2"


def test_opening_tells_shape_vocabulary_and_prompt_format(folder, toy_tokenizer):
    write_prompt_format(folder, PromptFormat("round", "P"))
    (folder / "manifest.json").unlink()
    opened = open_native(folder)
    assert (opened.shape.layers, opened.shape.hidden, opened.shape.window, opened.shape.rope_ratio) == (4, 256, 1024, 1)
    assert opened.prompt_format == PromptFormat("round", "P")
    assert opened.tokenizer.size == toy_tokenizer.size
    assert len(opened.files.tensors) == 3 + 4 * 11


def test_a_folder_without_prompt_format_was_taught_chatglm3s_own(folder):
    (folder / "prompt.json").unlink()
    (folder / "manifest.json").unlink()
    assert open_native(folder).prompt_format == PromptFormat()


@pytest.mark.parametrize("content", ["{", "[]", '{"template": "x"}', '{"temperature": 1}'])
def test_a_prompt_format_that_is_not_understood_is_refused(content, folder):
    (folder / "prompt.json").write_text(content)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"prompt\.json|template"):
        open_native(folder)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model_type": "llama"}, "says model_type 'llama'"),
        ({"model_type": "chatglm"}, "in the original layout; convert it first"),
        ({"rope_parameters": None}, "lacks"),
        ({"num_hidden_layers": 3}, "unknown: model.layers.3"),
        ({"num_hidden_layers": 5}, "missing: model.layers.4"),
        ({"head_dim": 64}, "of another shape"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_config_that_is_not_that_of_the_weights_is_refused(changed, words, folder):
    edit(folder, **changed)
    with pytest.raises(UserError, match=words):
        open_native(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("manifest", [True, False])
def test_a_missing_file_is_named_with_or_without_a_manifest(name, manifest, folder):
    (folder / name).unlink()
    if not manifest:
        (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=f"{name}|holds no weights"):
        open_native(folder)


def test_a_cut_file_is_found_without_reading_the_weights(folder):
    """B2: the size alone tells."""
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"model\.safetensors has {len(whole) - 1} bytes, not {len(whole)}"):
        open_native(folder)


def test_a_flipped_bit_is_found_with_verify_alone(folder):
    whole = bytearray((folder / "model.safetensors").read_bytes())
    whole[-1] ^= 1
    (folder / "model.safetensors").write_bytes(whole)
    assert open_native(folder).shape.layers == 4
    with pytest.raises(UserError, match=r"model\.safetensors has other contents"):
        open_native(folder, verify=True)


def test_a_vocabulary_larger_than_the_embedding_is_refused_with_both_sizes(folder):
    """A hand-copied tokenizer.json of another checkpoint: its last ids have no row."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"extra{number}" for number in range(100)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json has 2509 ids, config\.json 2432"):
        open_native(folder)


def test_verify_demands_a_manifest(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        open_native(folder, verify=True)


def test_a_missing_folder_is_named_with_the_ways_to_name_one(tmp_path):
    with pytest.raises(UserError, match=r"nothing is no folder.*--model, MODEL_PATH"):
        open_native(tmp_path / "nothing")


def test_both_vocabulary_files_are_copied_where_there_are_both(folder, tmp_path):
    for expected in (["tokenizer.json", "tokenizer.model"], ["tokenizer.json"]):
        target = tmp_path / str(len(expected))
        target.mkdir()
        copy_vocabulary(folder, target)
        assert sorted(file.name for file in target.iterdir()) == expected
        (folder / "tokenizer.model").unlink(missing_ok=True)
