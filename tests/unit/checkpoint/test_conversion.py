"""Conversion of the tiny model from the original layout to the native one and back."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.checkpoint import conversion
from entrypoints.checkpoint.conversion import convert_to_native, convert_to_original
from entrypoints.checkpoint.layout import ROTARY_BUFFER, ModelConfig
from entrypoints.checkpoint.manifest import check_manifest, read_manifest
from entrypoints.checkpoint.native import model_files, open_native


def read_bin(folder):
    return {name: tensor for file in sorted(folder.glob("*.bin")) for name, tensor in torch.load(file).items()}


def read_safetensors(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(found, expected):
    """Equal names, types and values."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


@pytest.fixture(scope="module")
def weights(toy_original):
    """Those of the tiny model, with biases and norms that differ from each other."""
    generator = torch.Generator().manual_seed(1)
    found = read_bin(toy_original)
    for name, tensor in found.items():
        if tensor.ndim == 1 and name != ROTARY_BUFFER:
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return found


@pytest.fixture
def written(weights, toy_original, tmp_path):
    """Write an original folder; `changed` are fields of its config.json."""

    def write(layout="one bin", dtype=torch.float16, **changed):
        folder = tmp_path / "original"
        folder.mkdir()
        config = json.loads((toy_original / "config.json").read_text()) | changed
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.model").write_bytes((toy_original / "tokenizer.model").read_bytes())
        shards, suffix = layout.split()
        stem, save = {"bin": ("pytorch_model", torch.save), "safetensors": ("model", save_file)}[suffix]
        as_dtype = {name: tensor.to(dtype) for name, tensor in weights.items()}
        if shards == "one":
            save(as_dtype, folder / f"{stem}.{suffix}")
            return folder
        weight_map = {}
        for number in range(3):
            file = f"{stem}-{number + 1:05}-of-00003.{suffix}"
            part = {name: tensor for index, (name, tensor) in enumerate(as_dtype.items()) if index % 3 == number}
            save(part, folder / file)
            weight_map |= dict.fromkeys(part, file)
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder

    return write


def reference_logits(weights, config, ids):
    """The forward pass of ChatGLM3's modeling_chatglm.py for one row, reimplemented in float32; logits (T, V).

    Half of each head is rotated, in neighboring pairs; several heads share the keys and values of a group; gate and
    value of the feed-forward layer are the halves of one projection.
    """
    get = {name.removeprefix("transformer."): tensor.float() for name, tensor in weights.items()}.__getitem__
    heads, groups, size = config["num_attention_heads"], config["multi_query_group_num"], config["kv_channels"]
    length, rotated = len(ids), size // 2
    theta = (10000 * config.get("rope_ratio", 1)) ** -(torch.arange(0, rotated, 2) / rotated)
    angles = torch.outer(torch.arange(length).float(), theta)[:, None]

    def norm(x, name):
        return get(name) * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + config["layernorm_epsilon"])

    def rotate(x):
        even, odd = x[..., :rotated:2], x[..., 1:rotated:2]
        pairs = (even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin())
        return torch.cat([torch.stack(pairs, -1).flatten(-2), x[..., rotated:]], -1)

    x = get("embedding.word_embeddings.weight")[ids]
    for number in range(config["num_layers"]):
        layer = f"encoder.layers.{number}."
        attention, mlp = layer + "self_attention.", layer + "mlp."
        mixed = norm(x, layer + "input_layernorm.weight") @ get(attention + "query_key_value.weight").T
        mixed = mixed + get(attention + "query_key_value.bias")
        query, key, value = mixed.view(length, -1, size).split([heads, groups, groups], 1)
        key, value = (part.repeat_interleave(heads // groups, 1) for part in (rotate(key), value))
        scores = torch.einsum("qhd,khd->hqk", rotate(query), key) / size**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
        x = x + torch.einsum("hqk,khd->qhd", scores, value).flatten(1) @ get(attention + "dense.weight").T
        gate, up = (norm(x, layer + "post_attention_layernorm.weight") @ get(mlp + "dense_h_to_4h.weight").T).chunk(
            2, -1
        )
        x = x + (torch.nn.functional.silu(gate) * up) @ get(mlp + "dense_4h_to_h.weight").T
    return norm(x, "encoder.final_layernorm.weight") @ get("output_layer.weight").T


@pytest.mark.parametrize("rope_ratio", [1, 50, 500])
def test_logits_are_those_of_the_original_formulas_for_3_and_300_tokens(rope_ratio, written, weights, tmp_path):
    """A wrong rotary embedding shows only at later positions; the 32k and 128k variants have another base."""
    source = written(rope_ratio=rope_ratio)
    convert_to_native(source, tmp_path / "native", PromptFormat())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32)
    assert model.config.rope_parameters["rope_theta"] == 10000 * rope_ratio
    config = json.loads((source / "config.json").read_text())
    ids = torch.randint(0, 2409, (300,), generator=torch.Generator().manual_seed(2))
    for length in (3, 300):
        with torch.no_grad():
            logits = model(input_ids=ids[None, :length]).logits[0]
        torch.testing.assert_close(logits, reference_logits(weights, config, ids[:length]), atol=1e-4, rtol=1e-4)


def test_plain_transformers_loads_the_folder_without_remote_code(toy_native):
    """No auto_map, no Python file, no newly initialized and no unused weight."""
    assert list(toy_native.glob("*.py")) == []
    assert "auto_map" not in (toy_native / "config.json").read_text()
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        toy_native, local_files_only=True, output_loading_info=True
    )
    assert type(model) is transformers.GlmForCausalLM
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


@pytest.mark.parametrize("layout", ["one bin", "three bin", "one safetensors", "three safetensors"])
def test_the_result_does_not_depend_on_how_the_source_is_stored(layout, written, weights, tmp_path):
    convert_to_native(written(layout), tmp_path / "native", PromptFormat())
    native = read_safetensors(tmp_path / "native")
    assert len(native) == 3 + 4 * 11  # 11 tensors per layer once q, k and v are separate
    fused = [native[f"model.layers.3.self_attn.{part}_proj.bias"] for part in "qkv"]
    assert torch.equal(torch.cat(fused), weights["transformer.encoder.layers.3.self_attention.query_key_value.bias"])
    assert torch.equal(native["lm_head.weight"], weights["transformer.output_layer.weight"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_converting_back_gives_bit_exact_tensors(dtype, written, weights, tmp_path):
    """Names, types and values, including the rotary buffer."""
    source = written(dtype=getattr(torch, dtype))
    convert_to_native(source, tmp_path / "native", PromptFormat())
    convert_to_original(tmp_path / "native", tmp_path / "back")
    expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights.items()}
    if dtype != "float16":  # the tiny model's buffer was rounded to float16 first
        half = torch.arange(0, 16, 2).to(getattr(torch, dtype)) / 16
        expected[ROTARY_BUFFER] = 1 / 10000**half
    assert same(read_safetensors(tmp_path / "back"), expected)
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("rope_ratio", [1, 50])
def test_converting_back_keeps_every_value_of_the_config(rope_ratio, written, tmp_path):
    source = written(rope_ratio=rope_ratio, seq_length=32768)
    convert_to_native(source, tmp_path / "native", PromptFormat())
    convert_to_original(tmp_path / "native", tmp_path / "back")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back")]
    model_configs = [ModelConfig.from_original(config, source) for config in configs]
    assert model_configs[0] == model_configs[1]
    assert [config.get("rope_ratio", 1) for config in configs] == [rope_ratio, rope_ratio]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_chosen_precision_applies_to_every_tensor_and_to_the_config(dtype, toy_original, tmp_path):
    convert_to_native(toy_original, tmp_path / "native", PromptFormat(), dtype)
    assert {tensor.dtype for tensor in read_safetensors(tmp_path / "native").values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "native" / "config.json").read_text())["dtype"] == dtype


def test_both_configs_hold_all_three_stop_ids(toy_native, toy_tokenizer):
    """Every program that generates from the folder stops at the same tokens."""
    stops = [
        json.loads((toy_native / name).read_text())["eos_token_id"]
        for name in ("config.json", "generation_config.json")
    ]
    assert stops == [list(toy_tokenizer.stop_ids)] * 2


def test_large_weights_are_written_in_shards_of_bounded_size(toy_original, toy_native, tmp_path, monkeypatch):
    """Only a single tensor may exceed the limit, as the embedding with 1.2 MB does here."""
    monkeypatch.setattr(conversion, "SHARD_BYTES", 1_000_000)
    convert_to_native(toy_original, tmp_path / "native", PromptFormat())
    shards = [load_file(file) for file in sorted((tmp_path / "native").glob("*.safetensors"))]
    assert len(shards) >= 6
    assert all(len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= 1_000_000 for shard in shards)
    assert same(read_safetensors(tmp_path / "native"), read_safetensors(toy_native))
    index = json.loads((tmp_path / "native" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for shard in shards for tensor in shard.values())
    assert open_native(tmp_path / "native", verify=True).files.nbytes == index["metadata"]["total_size"]
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "native").config.num_hidden_layers == 4


def test_the_manifest_covers_every_file_and_records_the_provenance(written, tmp_path):
    source = written()
    (source / "download.json").write_text('{"revision": "c0ffee"}')
    convert_to_native(source, tmp_path / "native", PromptFormat())
    files = [file for file in (tmp_path / "native").iterdir() if file.name != "manifest.json"]
    assert check_manifest(tmp_path / "native", hashes=True) == len(files) == len(model_files(tmp_path / "native"))
    assert read_manifest(tmp_path / "native")["provenance"] == {
        "made_by": "glm convert",
        "source": "original",
        "download": {"revision": "c0ffee"},
    }


def test_every_written_file_is_readable_for_other_users(toy_native):
    """A container rarely runs as the user who converted."""
    assert {oct(file.stat().st_mode & 0o444) for file in toy_native.iterdir()} == {"0o444"}


def test_the_prompt_format_is_stored_for_this_package_and_for_others(toy_original, tmp_path):
    prompt_format = PromptFormat("round", "写广告：")
    convert_to_native(toy_original, tmp_path / "native", prompt_format)
    assert open_native(tmp_path / "native").prompt_format == prompt_format
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "native", local_files_only=True)
    text = other.apply_chat_template([{"role": "user", "content": "裙"}], tokenize=False, add_generation_prompt=True)
    assert re.fullmatch(r"\[gMASK\]<sop>写广告：\[Round 1\]\n\n问：裙\n\n答：", text)
