"""Model folders, their single files, GGUF files and adapters, damaged by chance."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzzing import OUTCOMES, fuzz
from mutations import damage_bytes, damage_json, damage_json_text
from safetensors.torch import save_file

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.checkpoint.adapters import convert_adapter, open_adapter
from entrypoints.checkpoint.atomic_files import read_safetensors_header
from entrypoints.checkpoint.gguf_reader import open_gguf
from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.checkpoint.native import open_native
from entrypoints.checkpoint.tensor_files import open_weight_files, read_json
from entrypoints.checkpoint.tokenizer import convert_vocabulary, load_tokenizer, parse_tokenizer

pytestmark = pytest.mark.fuzz
TEXT = "类型#裙*风格#简约 hello 🙂 <|user|>\n"


@pytest.fixture
def model(toy_native, tmp_path):
    """A copy of the toy without the manifest, which would report every change."""
    folder = shutil.copytree(toy_native, tmp_path / "model")
    (folder / "manifest.json").unlink()
    return folder


def use(tokenizer):
    """What every engine does with a tokenizer."""
    ids = pickle.loads(pickle.dumps(tokenizer)).encode(TEXT)
    assert all(isinstance(tokenizer.token_bytes(id_), bytes) for id_ in ids)
    assert tokenizer.max_token_bytes >= 0


def test_gguf_files(toy_gguf, tmp_path):
    content, file = toy_gguf.read_bytes(), tmp_path / "toy.gguf"
    header = content[: content.index(b"glm.tokenizer_json")]

    def attempt(chance):
        area = chance.choice((len(header), 2000, len(content)))
        file.write_bytes(damage_bytes(content, chance, area))
        use(open_gguf(file).tokenizer)

    fuzz("gguf_files", attempt, 60)


@pytest.fixture
def llama_child():
    """A process that loads files with llama.cpp."""
    command = [sys.executable, Path(__file__).with_name("llama_child.py")]
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}  # otherwise it starts a debugger when it aborts
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as child:
        yield child
        child.stdin.close()


def test_what_llama_cpp_is_given(toy_gguf, tmp_path, llama_child):
    """A file that passes our checks must not abort llama.cpp, which would end the server."""
    content, file = toy_gguf.read_bytes(), tmp_path / "toy.gguf"
    names = (b"chatglm.", b"tokenizer.ggml.tokens", b"tokenizer.ggml.scores", b"token_embd.weight", b"blk.0.attn_norm")

    def attempt(chance):
        start = content.rindex(chance.choice(names)) - 40
        area = damage_bytes(content[start : start + 400], chance)
        file.write_bytes(content[:start] + area + content[start + 400 :])
        open_gguf(file)
        llama_child.stdin.write(f"{file}\n")
        llama_child.stdin.flush()
        assert llama_child.stdout.readline() in ("loaded\n", "rejected\n"), "llama.cpp ended the process"

    fuzz("what_llama_cpp_is_given", attempt, 40)


def test_strings_of_gguf_files(toy_gguf, tmp_path):
    """The texts in a file of otherwise correct form."""
    content, file = toy_gguf.read_bytes(), tmp_path / "toy.gguf"
    keys = (b"general.architecture", b"glm.prompt_format", b"glm.tokenizer_json", b"tokenizer.ggml.model")

    def attempt(chance):
        key = chance.choice(keys)
        start = content.index(key) + len(key) + 4
        size = struct.unpack_from("<Q", content, start)[0]
        text = content[start + 8 : start + 8 + size]
        try:
            text = damage_json_text(json.loads(text), chance)
        except ValueError:
            text = damage_bytes(text, chance)
        file.write_bytes(content[:start] + struct.pack("<Q", len(text)) + text + content[start + 8 + size :])
        use(open_gguf(file).tokenizer)

    fuzz("strings_of_gguf_files", attempt, 60)


def as_dict(value):
    return value if isinstance(value, dict) else {"": value}


def write_safetensors(file, header, data):
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


def test_safetensors_files(toy_native, tmp_path):
    folder, file = tmp_path, tmp_path / "model.safetensors"
    tensors = {f"layer.{name}": tensor for name, tensor in toy_tensors().items()}
    save_file(tensors, file, metadata={"format": "pt"})
    content = file.read_bytes()
    size = struct.unpack_from("<Q", content)[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]

    def attempt(chance):
        if chance.random() < 0.3:
            file.write_bytes(damage_bytes(content, chance, chance.choice((8, 8 + size, len(content)))))
        else:
            write_safetensors(file, damage_json_text(header, chance), data)
        read_safetensors_header(file)
        files = open_weight_files(folder)
        assert files.nbytes <= len(content) * 2
        files.load_file(file)

    fuzz("safetensors_files", attempt, 400)


def toy_tensors():
    return {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.float16), "c": torch.zeros(0, 2)}


def test_shard_indexes(tmp_path):
    shards = {f"model-0000{number}-of-00002.safetensors": tmp_path for number in (1, 2)}
    for name in shards:
        save_file(toy_tensors(), tmp_path / name)
    index = {"metadata": {"total_size": 9}, "weight_map": dict(zip("abc", [*shards, *shards], strict=False))}

    def attempt(chance):
        (tmp_path / "model.safetensors.index.json").write_bytes(damage_json_text(index, chance))
        open_weight_files(tmp_path)

    fuzz("shard_indexes", attempt, 400)


def test_pickled_weights(tmp_path):

    file = tmp_path / "pytorch_model.bin"
    torch.save(toy_tensors(), file)
    content = file.read_bytes()

    def attempt(chance):
        file.write_bytes(damage_bytes(content, chance, chance.choice((400, len(content)))))
        open_weight_files(tmp_path)

    fuzz("pickled_weights", attempt, 200)


def test_vocabularies(toy_original, tmp_path):
    content, file = (toy_original / "tokenizer.model").read_bytes(), tmp_path / "tokenizer.model"

    def attempt(chance):
        file.write_bytes(damage_bytes(content, chance))
        convert_vocabulary(file)

    fuzz("vocabularies", attempt, 20)


def test_tokenizer_files(toy_native, tmp_path):
    content = (toy_native / "tokenizer.json").read_bytes()
    value = json.loads(content)
    small = {name: part for name, part in value.items() if name != "model"}

    def attempt(chance):
        kind = chance.randrange(4)
        if kind == 0:
            text = damage_bytes(content, chance)
        elif kind == 1:
            text = damage_json_text(value, chance)
        elif kind == 2:
            text = json.dumps({**as_dict(damage_json(small, chance)), "model": value["model"]}).encode()
        else:
            model = {**value["model"], "merges": value["model"]["merges"][:9]}
            rest = damage_json({name: part for name, part in model.items() if name != "vocab"}, chance)
            text = json.dumps({**small, "model": {"vocab": model["vocab"], **as_dict(rest)}}).encode()
        use(parse_tokenizer(text, "tokenizer.json"))

    fuzz("tokenizer_files", attempt, 60)


@pytest.mark.parametrize("name", ["config.json", "prompt.json", "generation_config.json", "tokenizer_config.json"])
def test_json_files_of_models(name, model):
    value = json.loads((model / name).read_text())

    def attempt(chance):
        (model / name).write_bytes(damage_json_text(value, chance))
        open_native(model, quantized=chance.random() < 0.5)

    read = name != "tokenizer_config.json"  # written for other programs
    fuzz(f"json_files_of_models[{name}]", attempt, 80, outcomes=OUTCOMES if read else ["accepted"])


def test_original_configurations(toy_original, tmp_path):
    value, file = json.loads((toy_original / "config.json").read_text()), tmp_path / "config.json"

    def attempt(chance):
        file.write_bytes(damage_json_text(value, chance))
        ModelConfig.from_original(read_json(file), file)

    fuzz("original_configurations", attempt, 400)


def test_manifests(toy_native, tmp_path):
    model = shutil.copytree(toy_native, tmp_path / "model")
    value = json.loads((model / "manifest.json").read_text())

    def attempt(chance):
        (model / "manifest.json").write_bytes(damage_json_text(value, chance))
        open_native(model, verify=chance.random() < 0.1)

    fuzz("manifests", attempt, 80)


@pytest.fixture
def adapter(toy_native, toy_config, tmp_path):

    folder = tmp_path / "adapter"
    folder.mkdir()
    rank = 2
    modules = {f"model.layers.0.self_attn.{name}_proj" for name in "qo"}
    base = open_weight_files(toy_native).tensors
    tensors = {}
    for module in modules:
        rows, columns = base[f"{module}.weight"].shape
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(rank, columns)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(rows, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    open_adapter(folder, toy_config)
    return folder


@pytest.fixture
def toy_config(toy_native):
    return open_native(toy_native).model_config


def test_adapters(adapter, toy_config):
    files = {file: file.read_bytes() for file in adapter.iterdir()}
    config = json.loads((adapter / "adapter_config.json").read_text())

    def attempt(chance):
        for file, content in files.items():
            file.write_bytes(content)
        if chance.random() < 0.3:
            file = adapter / "adapter_model.safetensors"
            file.write_bytes(damage_bytes(files[file], chance, chance.choice((8, 500, len(files[file])))))
        else:
            (adapter / "adapter_config.json").write_bytes(damage_json_text(config, chance))
        opened = open_adapter(adapter, toy_config)
        if opened.pre_seq_len:
            opened.prefix()

    fuzz("adapters", attempt, 300)


def test_conversion_of_adapters(toy_native, toy_original, tmp_path):

    source = tmp_path / "source"
    source.mkdir()
    width = open_weight_files(toy_original).tensors[
        "transformer.encoder.layers.0.self_attention.query_key_value.weight"
    ]
    key = "base_model.model.transformer.encoder.layers.0.self_attention.query_key_value.lora_"
    torch.save(
        {f"{key}A.weight": torch.ones(2, width.shape[1]), f"{key}B.weight": torch.ones(width.shape[0], 2)},
        source / "adapter_model.bin",
    )
    weights = (source / "adapter_model.bin").read_bytes()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["query_key_value"], "bias": "none"}

    def attempt(chance):
        (source / "adapter_config.json").write_text(json.dumps(config))
        (source / "adapter_model.bin").write_bytes(weights)
        if chance.random() < 0.3:
            (source / "adapter_model.bin").write_bytes(damage_bytes(weights, chance))
        else:
            (source / "adapter_config.json").write_bytes(damage_json_text(config, chance))
        convert_adapter(source, tmp_path / "target", toy_native, PromptFormat(), overwrite=True)
        open_adapter(tmp_path / "target", open_native(toy_native).model_config)

    fuzz("conversion_of_adapters", attempt, 30)


def test_prefix_adapters(toy_config, tmp_path):

    folder = tmp_path / "prefix"
    folder.mkdir()
    shape = (toy_config.num_layers * 2, toy_config.num_kv_heads, 4, toy_config.head_dim)
    save_file({"prefix": torch.ones(shape)}, folder / "prefix.safetensors")
    content = (folder / "prefix.safetensors").read_bytes()
    config = {"adapter_type": "ptuning-v2", "pre_seq_len": 4}

    def attempt(chance):
        (folder / "prefix.safetensors").write_bytes(content)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        if chance.random() < 0.5:
            (folder / "prefix.safetensors").write_bytes(damage_bytes(content, chance, chance.choice((8, 200, 10**6))))
        else:
            (folder / "adapter_config.json").write_bytes(damage_json_text(config, chance))
        open_adapter(folder, toy_config).prefix()

    fuzz("prefix_adapters", attempt, 200)


def test_copied_tokenizers_of_models(model):
    """Through the folder, as engines load it."""
    value = json.loads((model / "tokenizer.json").read_text())

    def attempt(chance):
        (model / "tokenizer.json").write_bytes(damage_json_text(value, chance))
        load_tokenizer(model)

    fuzz("copied_tokenizers_of_models", attempt, 20)
