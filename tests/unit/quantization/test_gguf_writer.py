"""Writing a GGUF file: its content, and that no partial file is left."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.checkpoint.gguf_reader import GGUF_TYPES, PROVENANCE_KEY, open_gguf
from entrypoints.checkpoint.layout import ModelConfig, tensor_mappings
from entrypoints.checkpoint.native import open_native, write_prompt_format
from entrypoints.errors import UserError
from entrypoints.families import CHATGLM3
from entrypoints.file_writing import write_json
from entrypoints.quantization import ggml, tensor_types
from entrypoints.quantization.gguf_writer import write_gguf


@pytest.fixture
def folder(toy_native, tmp_path):
    """A copy of the tiny model to change, without the manifest that would detect the change."""
    shutil.copytree(toy_native, tmp_path / "native")
    (tmp_path / "native" / "manifest.json").unlink()
    return tmp_path / "native"


@pytest.fixture(scope="module")
def reader(toy_gguf):
    return gguf.GGUFReader(toy_gguf)


def change_tensor(folder, name, change):
    """Replace one tensor of a checkpoint by `change` of it."""
    weights = load_file(folder / "model.safetensors")
    weights[name] = change(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def dequantized(file):
    """Name -> float32 values and ggml type of every tensor of a GGUF file."""
    return {
        tensor.name: (gguf.dequantize(tensor.data, tensor.tensor_type), tensor.tensor_type.name)
        for tensor in gguf.GGUFReader(file).tensors
    }


def test_config_context_length_and_type_are_read_from_the_file_alone(toy_gguf, toy_native):
    checkpoint, source_config = open_gguf(toy_gguf), open_native(toy_native).model_config
    assert replace(checkpoint.model_config, rms_norm_eps=source_config.rms_norm_eps) == source_config
    assert checkpoint.model_config.rms_norm_eps == pytest.approx(source_config.rms_norm_eps)
    assert (checkpoint.context_length, checkpoint.type) == (1024, "f16")
    assert (
        checkpoint.model_config.kv_cache_bytes(1) == 4 * 2 * 2 * 32 * 2
    )  # layers, keys and values, groups, head_dim, bytes


def test_the_tokenizer_is_read_from_the_file_alone(toy_gguf, toy_tokenizer, sample_rows):
    tokenizer = open_gguf(toy_gguf).tokenizer
    texts = [row["summary"] for row in sample_rows] + ["👋 ①  \n<|user|>", ""]
    assert [tokenizer.encode(text) for text in texts] == [toy_tokenizer.encode(text) for text in texts]
    assert tokenizer.stop_ids == toy_tokenizer.stop_ids
    assert [tokenizer.special_token_id(name) for name in CHATGLM3.special_tokens] == list(
        map(toy_tokenizer.special_token_id, CHATGLM3.special_tokens)
    )


@pytest.mark.parametrize("prompt_format", [PromptFormat(), PromptFormat("round", "写广告：")])
def test_the_prompt_format_of_the_checkpoint_is_stored_in_the_file(prompt_format, folder, tmp_path):
    write_prompt_format(folder, prompt_format)
    write_gguf(folder, tmp_path / "out.gguf", "q4_0")
    assert open_gguf(tmp_path / "out.gguf").prompt_format == prompt_format
    template = gguf.GGUFReader(tmp_path / "out.gguf").get_field("tokenizer.chat_template").contents()
    assert template == prompt_format.chat_template()


def test_every_tensor_has_the_values_of_the_checkpoint(toy_gguf, toy_native):
    found, checkpoint = dequantized(toy_gguf), open_native(toy_native)
    weights = load_file(toy_native / "model.safetensors")
    entries = tensor_mappings(checkpoint.model_config)
    assert len(found) == len(entries) == 4 * 7 + 3
    names = [plan.name for plan in tensor_types.plan_tensor_types(checkpoint.model_config, "f16")]
    for name, entry in zip(names, entries, strict=True):
        expected = torch.cat([weights[part] for part in entry.native]).float().numpy()
        assert np.array_equal(found[name][0], expected), name
        assert found[name][1] == ("F16" if entry.columns else "F32")


@pytest.mark.parametrize(("type_", "error"), [("q8_0", 0.005), ("q4_0", 0.13)])
def test_quantization_error_is_within_a_rounding_step(type_, error, toy_native, toy_gguf, tmp_path):
    """1/254 of the largest value of a block for 8 bits, 1/8 for 4 bits."""
    write_gguf(toy_native, tmp_path / "out.gguf", type_)
    exact, found = dequantized(toy_gguf), dequantized(tmp_path / "out.gguf")
    kinds = {kind for _, kind in found.values()}
    assert kinds == ({"F32", "Q8_0"} if type_ == "q8_0" else {"F32", "Q8_0", "Q4_0"})
    for name, (values, kind) in found.items():
        off = np.abs(values - exact[name][0]).max()
        assert off <= (error if kind == "Q4_0" else 0.005) * max(1e-9, np.abs(exact[name][0]).max()), name
    eight_bits = [name for name, (_, kind) in found.items() if kind == "Q8_0"]
    assert type_ == "q8_0" or sorted(eight_bits) == ["output.weight", "token_embd.weight"]


def test_rows_that_do_not_fill_blocks_are_stored_in_float16(toy_native):
    model_config = replace(open_native(toy_native).model_config, intermediate_size=48)
    kinds = {plan.name: plan.ggml_type.name for plan in tensor_types.plan_tensor_types(model_config, "q4_0")}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q4_0")


def test_k_quants_use_the_mixture_of_llama_cpp():
    """The 6B: rows of 13,696 values do not fill blocks of 256, so ffn_down takes types with blocks of 32."""
    model_config = ModelConfig(28, 4096, 32, 2, 128, 13696, 65024, 8192, 1e-5, 1)

    def kinds(type_):
        return {plan.name: plan.ggml_type.name for plan in tensor_types.plan_tensor_types(model_config, type_)}

    four, five = kinds("q4_k_m"), kinds("q5_k_m")
    names = ("output", "token_embd", "blk.4.attn_qkv", "blk.4.attn_output", "blk.4.ffn_up", "blk.4.ffn_down")
    assert [four[f"{name}.weight"] for name in names] == ["Q6_K", "Q4_K", "Q5_K", "Q4_K", "Q4_K", "Q5_0"]
    assert [five[f"{name}.weight"] for name in names] == ["Q6_K", "Q5_K", "Q6_K", "Q5_K", "Q5_K", "Q5_1"]
    better = [layer for layer in range(28) if four[f"blk.{layer}.ffn_down.weight"] == "Q8_0"]
    assert better == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]
    sizes = {
        type_: sum(plan.size for plan in tensor_types.plan_tensor_types(model_config, type_)) / 1e9
        for type_ in GGUF_TYPES
    }
    assert sizes["q4_0"] < 3.8 < sizes["q4_k_m"] < 4.2 < sizes["q5_k_m"] < 4.8 < sizes["q8_0"] < 6.7 < sizes["f16"]


@pytest.mark.parametrize("name", ["F32", "F16", "Q8_0", "Q4_0"])
def test_llama_cpp_writes_the_same_bytes_as_the_reference_in_gguf(name):
    """For these types gguf has its own numpy code; the first values are subnormal or at the limit of float16."""
    values = np.random.default_rng(0).standard_normal((5, 256), np.float32)
    values[0, :8] = [1e-7, 6e-8, 2e-8, 65504, -65504, 0, -0.0, 5e-6]
    type_ = gguf.GGMLQuantizationType[name]
    assert ggml.quantize(values, type_).tobytes() == gguf.quantize(values, type_).tobytes()


def test_an_important_column_gets_a_smaller_error():
    values = np.random.default_rng(0).standard_normal((64, 256), np.float32)
    weights = np.where(np.arange(256) % 8 == 0, 100, 0.1).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_K

    def error(importance):
        found = gguf.dequantize(ggml.quantize(values, kind, importance), kind)
        return np.square(found - values)[:, ::8].mean()

    assert error(weights) < 0.5 * error(None)


def test_long_context_variants_keep_their_rope_ratio(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500000.0
    write_json(folder / "config.json", config)
    write_gguf(folder, tmp_path / "out.gguf", "f16")
    assert open_gguf(tmp_path / "out.gguf").model_config.rope_ratio == 50


def test_unmodified_llama_cpp_finds_vocabulary_and_stop_ids(reader, toy_tokenizer):
    def field(name):
        return reader.get_field(f"tokenizer.ggml.{name}").contents()

    texts, types = field("tokens"), field("token_type")
    assert len(texts) == len(types) == len(field("scores")) == 2432  # the rows of the embedding
    assert [texts[toy_tokenizer.special_token_id(name)] for name in CHATGLM3.special_tokens] == list(
        CHATGLM3.special_tokens
    )
    assert {types[toy_tokenizer.special_token_id(name)] for name in CHATGLM3.special_tokens} == {gguf.TokenType.CONTROL}
    assert set(types[toy_tokenizer.size :]) == {gguf.TokenType.UNUSED}
    assert types[toy_tokenizer.byte_token_id(0xE4)] == gguf.TokenType.BYTE
    assert (field("eos_token_id"), field("eot_token_id"), field("eom_token_id")) == toy_tokenizer.stop_ids
    assert field("add_bos_token") is False


def test_the_file_contains_its_provenance(reader, toy_native):
    provenance = json.loads(reader.get_field(PROVENANCE_KEY).contents())
    assert provenance["made_by"] == "glm quantize"
    assert provenance["source_made"] == json.loads((toy_native / "manifest.json").read_text())["provenance"]


def test_an_interrupt_leaves_no_file(toy_native, tmp_path, monkeypatch):
    calls = iter(range(100))

    def quantize(data, ggml_type, importance):
        if next(calls) == 9:
            raise KeyboardInterrupt
        return data.astype(np.float16 if ggml_type.name == "F16" else np.float32).view(np.uint8)

    monkeypatch.setattr(ggml, "quantize", quantize)
    with pytest.raises(KeyboardInterrupt):
        write_gguf(toy_native, tmp_path / "out.gguf", "f16")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_not_overwritten(toy_native, tmp_path):
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(UserError, match=r"out\.gguf exists"):
        write_gguf(toy_native, tmp_path / "out.gguf", "f16")
    assert (tmp_path / "out.gguf").read_text() == "mine"


def test_a_full_disk_is_reported_before_writing(toy_native, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"needs \S+ [kM]B, its disk has"):
        write_gguf(toy_native, tmp_path / "out.gguf", "f16")
    assert list(tmp_path.iterdir()) == []


def test_a_target_without_the_suffix_gguf_is_rejected(toy_native, tmp_path):
    with pytest.raises(UserError, match=r"does not end in \.gguf"):
        write_gguf(toy_native, tmp_path / "out.bin", "f16")


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("adapter_config.json", {"peft_type": "LORA"}, "LoRA adapter, not a full model; .*--adapter"),
        ("adapter_config.json", {"adapter_type": "ptuning-v2", "pre_seq_len": 8}, "which a GGUF file cannot store"),
        ("config.json", {"model_type": "chatglm", "pre_seq_len": 8}, "P-Tuning v2 prefix"),
    ],
)
def test_an_adapter_folder_is_rejected(name, config, message, tmp_path):
    (tmp_path / name).write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        write_gguf(tmp_path, tmp_path / "out.gguf", "f16")


def test_a_checkpoint_without_its_sentencepiece_vocabulary_is_rejected(folder, tmp_path):
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"file not found: .*tokenizer\.model"):
        write_gguf(folder, tmp_path / "out.gguf", "f16")


@pytest.mark.parametrize(("value", "type_"), [(float("nan"), "q4_0"), (float("inf"), "q8_0"), (70000.0, "f16")])
def test_values_that_the_type_cannot_represent_are_rejected(value, type_, folder, tmp_path):
    def put(tensor):
        tensor = tensor.float()
        tensor[1, 1] = value
        return tensor

    change_tensor(folder, "lm_head.weight", put)
    with pytest.raises(UserError, match=r"lm_head\.weight contains NaN or values above"):
        write_gguf(folder, tmp_path / "out.gguf", type_)
    assert not (tmp_path / "out.gguf").exists()


def test_bfloat16_checkpoints_can_be_written(folder, tmp_path):
    change_tensor(folder, "model.norm.weight", lambda tensor: tensor.bfloat16() + 0.5)
    write_gguf(folder, tmp_path / "out.gguf", "q8_0")
    assert dequantized(tmp_path / "out.gguf")["output_norm.weight"][0][0] == 1.5
