"""config.json, GGUF metadata and adapter_config.json with numbers of a wrong type or size."""

import json
import math
import os
import shutil
import struct
from pathlib import Path

import pytest
import transformers

from entrypoints.checkpoint.adapters import open_adapter
from entrypoints.checkpoint.gguf_reader import open_gguf
from entrypoints.checkpoint.layout import NATIVE_KEYS, ORIGINAL_KEYS, ModelConfig
from entrypoints.checkpoint.native import open_native
from entrypoints.errors import UserError

BAD = [10**9 + 1, 1e300, -1, 0, True, math.nan, math.inf, "4", None, [4], {}, 10**400]
INTEGERS = [key for field, key in NATIVE_KEYS.items() if field not in ("rms_norm_eps", "rope_theta")]


@pytest.fixture(scope="module")
def native(toy_native):
    return json.loads((toy_native / "config.json").read_text())


@pytest.mark.parametrize("value", [*BAD, 4.0], ids=lambda value: f"{value!r:.20}")
@pytest.mark.parametrize("key", INTEGERS)
def test_a_native_number_of_a_wrong_type_or_size_is_named_with_its_range(key, value, native):
    with pytest.raises(UserError, match=rf"config\.json: {key} is .*, not a.* to "):
        ModelConfig.from_native(native | {key: value}, Path("config.json"))


@pytest.mark.parametrize("value", BAD, ids=lambda value: f"{value!r:.20}")
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_parameters.rope_theta"])
def test_a_native_fraction_of_a_wrong_type_or_size_is_named_with_its_range(key, value, native):
    changed = {"rms_norm_eps": value} if key == "rms_norm_eps" else {"rope_parameters": {"rope_theta": value}}
    with pytest.raises(UserError, match=rf"config\.json: {key} is .*, not a number from "):
        ModelConfig.from_native(native | changed, Path("config.json"))


@pytest.mark.parametrize("value", BAD, ids=lambda value: f"{value!r:.20}")
@pytest.mark.parametrize("key", ORIGINAL_KEYS.values())
def test_an_original_number_of_a_wrong_type_or_size_is_named_with_its_range(key, value, toy_original):
    config = json.loads((toy_original / "config.json").read_text())
    with pytest.raises(UserError, match=rf"config\.json: {key} is .*, not a.* to "):
        ModelConfig.from_original(config | {key: value}, Path("config.json"))


@pytest.mark.parametrize(
    "changed", [{"num_labels": 10**6}, {"anything": {"nested": [1e300]}}, {"x": math.nan}], ids=str
)
def test_any_other_number_is_bounded(changed, native):
    with pytest.raises(UserError, match=r"config\.json: .* is .*, not a number from"):
        ModelConfig.from_native(native | changed, Path("config.json"))


OTHER_MODELS = {
    "architectures": [["LlamaForCausalLM"], ["GlmForCausalLM", "x"], "GlmForCausalLM", None],
    "attention_bias": [False, None, 1],
    "hidden_act": ["gelu", "SiLU", None, ["silu"]],
    "tie_word_embeddings": [True],
    "layer_types": [["sliding_attention"]],
    "mlp_bias": [True],
    "partial_rotary_factor": [1.0, "0.5"],
    "rope_scaling": [{"type": "linear", "factor": 4.0}],
    "sliding_window": [512],
    "rope_parameters.rope_type": ["yarn", None],
    "rope_parameters.type": ["linear"],
    "rope_parameters.partial_rotary_factor": [1.0, 0.25, True, "0.5", None],
    "rope_parameters.factor": [4.0],
}


def with_value(config: dict, key: str, value: object) -> dict:
    outer, _, inner = key.partition(".")
    return config | {outer: {**config[outer], inner: value} if inner else value}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in OTHER_MODELS.items() for value in values], ids=str
)
def test_a_native_config_of_another_architecture_is_rejected_by_name(key, value, native):
    """transformers, vLLM and llama.cpp would each load it as a different model."""
    with pytest.raises(UserError, match=rf"config\.json has {key}=.*; use the config\.json that glm convert wrote"):
        ModelConfig.from_native(with_value(native, key, value), Path("config.json"))


def test_every_value_that_the_conversion_writes_is_compared_or_a_dimension(native):
    """A key that the conversion begins to write must be checked when it is read."""
    compared = {key.partition(".")[0] for key in (*OTHER_MODELS, *NATIVE_KEYS.values())}
    typed = {"attention_dropout", "dtype", "eos_token_id", "pad_token_id", "model_type"}
    assert set(native) <= compared | typed
    assert {f"rope_parameters.{key}" for key in native["rope_parameters"]} <= {*OTHER_MODELS, *NATIVE_KEYS.values()}


def test_missing_values_are_those_of_the_architecture(native):
    """The defaults of transformers are the same, so the configuration is the same with and without them."""
    optional = ("architectures", "attention_bias", "hidden_act", "tie_word_embeddings", "dtype", "attention_dropout")
    shorter = {key: value for key, value in native.items() if key not in optional}
    shorter["rope_parameters"] = {"rope_theta": native["rope_parameters"]["rope_theta"], "rope_type": "default"}
    assert ModelConfig.from_native(shorter, Path("x")) == ModelConfig.from_native(native, Path("x"))
    full, short = (transformers.GlmConfig(**config) for config in (native, shorter))
    for key in ("hidden_act", "attention_bias", "tie_word_embeddings", "attention_dropout", "rope_parameters"):
        assert getattr(full, key) == getattr(short, key), key


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dtype", "float99", "dtype is 'float99'; supported are float32, bfloat16, float16"),
        ("torch_dtype", ["float32"], "torch_dtype is"),
        ("attention_dropout", 2, "attention_dropout is 2, not a number from 0 to 1"),
        ("attention_dropout", "0", "attention_dropout is '0'"),
        *(("pad_token_id", value, "pad_token_id is") for value in (-1, 10**8, "0", True, 1.0, {})),
        *(("eos_token_id", value, "eos_token_id is") for value in ([2, "x"], [[2]], [2] * 100, 10**8)),
        ("bos_token_id", -1, "bos_token_id is"),
    ],
    ids=str,
)
def test_a_value_that_no_model_can_be_loaded_with_is_named(key, value, message, native):
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        ModelConfig.from_native(native | {key: value}, Path("config.json"))


def deeply_nested(file: Path) -> None:
    file.write_text("[" * 200_000)


def sparse(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(10**12)


def dangling(file: Path) -> None:
    file.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (deeply_nested, "is nested too deeply"),
        (sparse, "MB of JSON"),
        (os.mkfifo, "contains no generation_config"),
        (Path.mkdir, "contains no generation_config"),
        (dangling, "contains no generation_config"),
        (lambda file: file.write_text("[]"), "is not a JSON object"),
        (lambda file: file.write_text('{"eos_token_id": "x"}'), "eos_token_id is 'x', not an id"),
        (lambda file: file.write_text('{"eos_token_id": [2, 500]}'), r"eos_token_id has \[500\], the stop ids"),
    ],
    ids=["nested", "sparse", "pipe", "folder", "link", "list", "type", "other ids"],
)
def test_a_crafted_generation_config_is_a_user_error(write, message, toy_native, tmp_path, monkeypatch):
    monkeypatch.setattr("entrypoints.untrusted.MAX_JSON_BYTES", 1 << 20)  # 256 MB in use
    folder = shutil.copytree(toy_native, tmp_path / "native")
    (folder / "manifest.json").unlink()
    (folder / "generation_config.json").unlink()
    assert open_native(folder)  # it may be missing
    write(folder / "generation_config.json")
    with pytest.raises(UserError, match=message):
        open_native(folder)


def test_key_value_heads_that_do_not_divide_the_heads_are_rejected(native):
    with pytest.raises(UserError, match=r"num_key_value_heads is 3, which does not divide num_attention_heads 8"):
        ModelConfig.from_native(native | {"num_key_value_heads": 3}, Path("config.json"))


@pytest.mark.parametrize("name", ["config.json", "prompt.json", "manifest.json"])
def test_a_deeply_nested_file_is_a_user_error(name, toy_native, tmp_path):
    folder = shutil.copytree(toy_native, tmp_path / "native")
    (folder / "manifest.json").unlink()
    (folder / name).write_text("[" * 200_000)
    with pytest.raises(UserError, match=rf"{name} is nested too deeply"):
        open_native(folder)


@pytest.mark.parametrize("value", [0, 2**32 - 1])
def test_a_gguf_number_out_of_range_is_named(value, toy_gguf, tmp_path):
    content, key = bytearray(toy_gguf.read_bytes()), b"chatglm.block_count"
    offset = content.index(key) + len(key)
    assert struct.unpack_from("<I", content, offset) == (4,)  # the type: uint32
    struct.pack_into("<I", content, offset + 4, value)
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.gguf: chatglm\.block_count is {value}, not an integer from 1 to 1024"):
        open_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("counts", "entry"),
    [
        ((0, 10**10), b""),
        ((10**10, 0), b""),
        ((0, 1), struct.pack("<Q", 10**11)),
        ((0, 1), struct.pack("<QIQ", 0, 8, 10**11)),
        ((0, 1), struct.pack("<QIIQ", 0, 9, 8, 10**10)),
    ],
    ids=["values", "tensors", "key", "string", "strings"],
)
def test_a_sparse_gguf_file_cannot_make_the_reader_read_gigabytes(counts, entry, tmp_path):
    file = tmp_path / "x.gguf"
    with file.open("wb") as stream:
        stream.write(b"GGUF" + struct.pack("<IQQ", 3, *counts) + entry)
        stream.truncate(10**12)
    with pytest.raises(UserError, match=r"x\.gguf is .*damaged"):
        open_gguf(file)


@pytest.mark.parametrize("value", BAD, ids=lambda value: f"{value!r:.20}")
def test_the_length_of_a_prefix_is_checked(value, toy_native, tmp_path):
    config = {"adapter_type": "ptuning-v2", "pre_seq_len": value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "prefix.safetensors").touch()
    with pytest.raises(UserError, match=r"adapter_config\.json: pre_seq_len is .*, not an integer from 1 to"):
        open_adapter(tmp_path, open_native(toy_native).model_config)
