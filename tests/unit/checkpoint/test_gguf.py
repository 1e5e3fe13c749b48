"""One GGUF file: what is in it, what opening refuses, and that nothing half made is left."""

import json
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from entrypoints.checkpoint import ggml, gguf_plan
from entrypoints.checkpoint.gguf import PROMPT_KEY, PROVENANCE_KEY, TOKENIZER_KEY, TYPES, open_gguf
from entrypoints.checkpoint.gguf_writing import write_gguf
from entrypoints.checkpoint.layout import Shape, tensors
from entrypoints.checkpoint.native import open_native, write_json, write_prompt_format
from entrypoints.errors import UserError
from entrypoints.prompt import CONTROL_TOKENS, PromptFormat


@pytest.fixture
def folder(toy_native, tmp_path):
    """A copy of the toy to change, without the manifest that would notice."""
    shutil.copytree(toy_native, tmp_path / "native")
    (tmp_path / "native" / "manifest.json").unlink()
    return tmp_path / "native"


@pytest.fixture(scope="module")
def reader(toy_gguf):
    return gguf.GGUFReader(toy_gguf)


def change(folder, name, make):
    """Replace one tensor of a checkpoint."""
    weights = load_file(folder / "model.safetensors")
    weights[name] = make(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def numbers(file):
    """Every tensor of a GGUF file in float32, and its kind."""
    return {
        tensor.name: (gguf.dequantize(tensor.data, tensor.tensor_type), tensor.tensor_type.name)
        for tensor in gguf.GGUFReader(file).tensors
    }


def pack(*, architecture=b"chatglm", pairs=(), version=3, tail=b""):
    """A GGUF file of text values and no tensors."""
    entries = [(b"general.architecture", architecture), *pairs]
    texts = [struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value for key, value in entries]
    return b"GGUF" + struct.pack("<IQQ", version, 0, len(entries)) + b"".join(texts) + tail


def test_the_file_alone_gives_shape_window_and_type_back(toy_gguf, toy_native):
    checkpoint, shape = open_gguf(toy_gguf), open_native(toy_native).shape
    assert replace(checkpoint.shape, norm_eps=shape.norm_eps) == shape
    assert checkpoint.shape.norm_eps == pytest.approx(shape.norm_eps)
    assert (checkpoint.window, checkpoint.type) == (1024, "f16")
    assert checkpoint.shape.cache_bytes(1) == 4 * 2 * 2 * 32 * 2  # layers, keys and values, groups, head_dim, bytes


def test_the_file_alone_gives_the_tokenizer_back(toy_gguf, toy_tokenizer, sample_rows):
    tokenizer = open_gguf(toy_gguf).tokenizer
    texts = [row["summary"] for row in sample_rows] + ["👋 ①  \n<|user|>", ""]
    assert [tokenizer.encode(text) for text in texts] == [toy_tokenizer.encode(text) for text in texts]
    assert tokenizer.stop_ids == toy_tokenizer.stop_ids
    assert [tokenizer.control(name) for name in CONTROL_TOKENS] == list(map(toy_tokenizer.control, CONTROL_TOKENS))


@pytest.mark.parametrize("prompt_format", [PromptFormat(), PromptFormat("round", "写广告：")])
def test_a_file_is_asked_as_its_checkpoint_was_taught(prompt_format, folder, tmp_path):
    write_prompt_format(folder, prompt_format)
    write_gguf(folder, tmp_path / "out.gguf", "q4_0")
    assert open_gguf(tmp_path / "out.gguf").prompt_format == prompt_format
    template = gguf.GGUFReader(tmp_path / "out.gguf").get_field("tokenizer.chat_template").contents()
    assert template == prompt_format.chat_template()


def test_every_tensor_is_there_with_the_checkpoints_numbers(toy_gguf, toy_native):
    found, checkpoint = numbers(toy_gguf), open_native(toy_native)
    weights = load_file(toy_native / "model.safetensors")
    entries = tensors(checkpoint.shape)
    assert len(found) == len(entries) == 4 * 7 + 3
    names = [plan.name for plan in gguf_plan.plans(checkpoint.shape, "f16")]
    for name, entry in zip(names, entries, strict=True):
        expected = torch.cat([weights[part] for part in entry.native]).float().numpy()
        assert np.array_equal(found[name][0], expected), name
        assert found[name][1] == ("F16" if entry.columns else "F32")


@pytest.mark.parametrize(("type_", "error"), [("q8_0", 0.005), ("q4_0", 0.13)])
def test_quantised_numbers_are_near_the_checkpoints(type_, error, toy_native, toy_gguf, tmp_path):
    """Within a rounding step: 1/254 of a block's largest number for 8 bits, 1/8 for 4."""
    write_gguf(toy_native, tmp_path / "out.gguf", type_)
    exact, found = numbers(toy_gguf), numbers(tmp_path / "out.gguf")
    kinds = {kind for _, kind in found.values()}
    assert kinds == ({"F32", "Q8_0"} if type_ == "q8_0" else {"F32", "Q8_0", "Q4_0"})
    for name, (values, kind) in found.items():
        off = np.abs(values - exact[name][0]).max()
        assert off <= (error if kind == "Q4_0" else 0.005) * max(1e-9, np.abs(exact[name][0]).max()), name
    eight_bits = [name for name, (_, kind) in found.items() if kind == "Q8_0"]
    assert type_ == "q8_0" or sorted(eight_bits) == ["output.weight", "token_embd.weight"]


def test_rows_that_do_not_fill_blocks_stay_in_half_precision(toy_native):
    shape = replace(open_native(toy_native).shape, ffn=48)
    kinds = {plan.name: plan.kind.name for plan in gguf_plan.plans(shape, "q4_0")}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q4_0")


def test_k_quants_give_more_bits_where_llama_cpp_does():
    """The 6B: rows of 13,696 numbers do not fill blocks of 256, so ffn_down takes kinds with blocks of 32."""
    shape = Shape(28, 4096, 32, 2, 128, 13696, 65024, 8192, 1e-5, 1)

    def kinds(type_):
        return {plan.name: plan.kind.name for plan in gguf_plan.plans(shape, type_)}

    four, five = kinds("q4_k_m"), kinds("q5_k_m")
    names = ("output", "token_embd", "blk.4.attn_qkv", "blk.4.attn_output", "blk.4.ffn_up", "blk.4.ffn_down")
    assert [four[f"{name}.weight"] for name in names] == ["Q6_K", "Q4_K", "Q5_K", "Q4_K", "Q4_K", "Q5_0"]
    assert [five[f"{name}.weight"] for name in names] == ["Q6_K", "Q5_K", "Q6_K", "Q5_K", "Q5_K", "Q5_1"]
    better = [layer for layer in range(28) if four[f"blk.{layer}.ffn_down.weight"] == "Q8_0"]
    assert better == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]
    sizes = {type_: sum(plan.size for plan in gguf_plan.plans(shape, type_)) / 1e9 for type_ in TYPES}
    assert sizes["q4_0"] < 3.8 < sizes["q4_k_m"] < 4.2 < sizes["q5_k_m"] < 4.8 < sizes["q8_0"] < 6.7 < sizes["f16"]


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0])
def test_llama_cpps_quantiser_and_numpys_write_the_same_bytes(kind):
    values = np.random.default_rng(0).standard_normal((5, 256), np.float32)
    assert ggml.quantiser_missing() is None
    assert np.array_equal(ggml.quantize(values, kind), gguf.quantize(values, kind))


def test_an_important_column_is_kept_nearer():
    values = np.random.default_rng(0).standard_normal((64, 256), np.float32)
    weights = np.where(np.arange(256) % 8 == 0, 100, 0.1).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_K

    def error(importance):
        found = gguf.dequantize(ggml.quantize(values, kind, importance), kind)
        return np.square(found - values)[:, ::8].mean()

    assert error(weights) < 0.5 * error(None)


def test_long_window_variants_keep_their_rope_ratio(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500000.0
    write_json(folder / "config.json", config)
    write_gguf(folder, tmp_path / "out.gguf", "f16")
    assert open_gguf(tmp_path / "out.gguf").shape.rope_ratio == 50


def test_stock_llama_cpp_finds_its_vocabulary_and_stop_ids(reader, toy_tokenizer):
    def field(name):
        return reader.get_field(f"tokenizer.ggml.{name}").contents()

    texts, types = field("tokens"), field("token_type")
    assert len(texts) == len(types) == len(field("scores")) == 2432  # the rows of the embedding
    assert [texts[toy_tokenizer.control(name)] for name in CONTROL_TOKENS] == list(CONTROL_TOKENS)
    assert {types[toy_tokenizer.control(name)] for name in CONTROL_TOKENS} == {gguf.TokenType.CONTROL}
    assert set(types[toy_tokenizer.size :]) == {gguf.TokenType.UNUSED}
    assert types[toy_tokenizer.byte(0xE4)] == gguf.TokenType.BYTE
    assert (field("eos_token_id"), field("eot_token_id"), field("eom_token_id")) == toy_tokenizer.stop_ids
    assert field("add_bos_token") is False


def test_the_file_says_where_it_comes_from(reader, toy_native):
    provenance = json.loads(reader.get_field(PROVENANCE_KEY).contents())
    assert provenance["made_by"] == "glm quantize"
    assert provenance["source_made"] == json.loads((toy_native / "manifest.json").read_text())["provenance"]


def test_an_interrupt_leaves_nothing_behind(toy_native, tmp_path, monkeypatch):
    calls = iter(range(100))

    def quantize(data, kind, importance):
        if next(calls) == 9:
            raise KeyboardInterrupt
        return data.astype(np.float16 if kind.name == "F16" else np.float32)

    monkeypatch.setattr(ggml, "quantize", quantize)
    with pytest.raises(KeyboardInterrupt):
        write_gguf(toy_native, tmp_path / "out.gguf", "f16")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_not_touched(toy_native, tmp_path):
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(UserError, match=r"out\.gguf exists"):
        write_gguf(toy_native, tmp_path / "out.gguf", "f16")
    assert (tmp_path / "out.gguf").read_text() == "mine"


def test_too_small_a_disk_is_found_before_writing(toy_native, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"needs 0\.0 GB and its disk has"):
        write_gguf(toy_native, tmp_path / "out.gguf", "f16")
    assert list(tmp_path.iterdir()) == []


def test_a_name_without_gguf_is_refused(toy_native, tmp_path):
    with pytest.raises(UserError, match=r"does not end in \.gguf"):
        write_gguf(toy_native, tmp_path / "out.bin", "f16")


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("adapter_config.json", {"peft_type": "LORA"}, "LoRA adapter.*this with --adapter"),
        ("adapter_config.json", {"adapter_type": "ptuning-v2", "pre_seq_len": 8}, "no place for one"),
        ("config.json", {"model_type": "chatglm", "pre_seq_len": 8}, "P-Tuning v2 prefix"),
    ],
)
def test_adapters_are_refused_in_words(name, config, words, tmp_path):
    (tmp_path / name).write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        write_gguf(tmp_path, tmp_path / "out.gguf", "f16")


def test_a_checkpoint_without_its_original_vocabulary_is_refused(folder, tmp_path):
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer\.model"):
        write_gguf(folder, tmp_path / "out.gguf", "f16")


@pytest.mark.parametrize(("value", "type_"), [(float("nan"), "q4_0"), (float("inf"), "q8_0"), (70000.0, "f16")])
def test_numbers_that_the_type_cannot_hold_are_refused(value, type_, folder, tmp_path):
    def put(tensor):
        tensor = tensor.float()
        tensor[1, 1] = value
        return tensor

    change(folder, "lm_head.weight", put)
    with pytest.raises(UserError, match=r"lm_head\.weight holds NaN or numbers above"):
        write_gguf(folder, tmp_path / "out.gguf", type_)
    assert not (tmp_path / "out.gguf").exists()


def test_bfloat16_checkpoints_are_written_too(folder, tmp_path):
    change(folder, "model.norm.weight", lambda tensor: tensor.bfloat16() + 0.5)
    write_gguf(folder, tmp_path / "out.gguf", "q8_0")
    assert numbers(tmp_path / "out.gguf")["output_norm.weight"][0][0] == 1.5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is no file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"", "is no GGUF file"),
        (b"PK\x03\x04 a zip", "is no GGUF file"),
        (pack(version=2), "is of GGUF version 2"),
        (pack(architecture=b"llama"), "architecture 'llama'"),
        (pack(), rf"made by another program: it lacks {TOKENIZER_KEY}, {PROMPT_KEY}"),
        (pack(pairs=[(TOKENIZER_KEY.encode(), b"{}"), (PROMPT_KEY.encode(), b"{}")]), "lacks 'chatglm.block_count'"),
        (pack()[:-3], "is truncated"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_cannot_be_used_is_refused_in_words(content, words, tmp_path):
    file = tmp_path / "model.gguf"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=words):
        open_gguf(file)


def test_a_folder_is_no_gguf_file(tmp_path):
    with pytest.raises(UserError, match="is no file"):
        open_gguf(tmp_path)


def test_a_file_cut_anywhere_is_refused(toy_gguf, tmp_path):
    """B3: by its header where that is whole, else by the header itself."""
    content, file = toy_gguf.read_bytes(), tmp_path / "cut.gguf"
    for share in (0.00001, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999):
        file.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(UserError, match=r"is truncated.*copy or make the file again"):
            open_gguf(file)


@pytest.mark.parametrize("place", [4, 8, 16, 24, 60])
def test_damaged_headers_end_in_words_too(place, toy_gguf, tmp_path):
    content = bytearray(toy_gguf.read_bytes())
    content[place : place + 8] = b"\xff" * 8
    (tmp_path / "damaged.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"damaged\.gguf"):
        open_gguf(tmp_path / "damaged.gguf")


def test_opening_needs_no_torch(toy_gguf):
    """The image that runs quantised models has none."""
    code = (
        "import sys; from pathlib import Path; from entrypoints.checkpoint.gguf import open_gguf;"
        f"open_gguf(Path({str(toy_gguf)!r}));"
        "print(sorted({'torch', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
