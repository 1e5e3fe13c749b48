"""LoRA and P-Tuning v2 adapters of the tiny model: conversion, validation, and equality with the original formulas."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.checkpoint.adapters import convert_adapter, is_adapter, open_adapter
from entrypoints.checkpoint.conversion import convert_to_native
from entrypoints.checkpoint.manifest import check_manifest
from entrypoints.checkpoint.native import open_native
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.errors import UserError

FORMAT = PromptFormat()
QKV = "transformer.encoder.layers.{}.self_attention.query_key_value.weight"
RANK, ALPHA, LENGTH = 4, 16, 4
GROUPS, HEAD, LAYERS = 2, 32, 4
VALUES = LAYERS * 2 * GROUPS * HEAD
PREFIX = "transformer.prefix_encoder."


def noise(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.fixture
def lora(tmp_path):
    """As the official fine-tuning script saves it: query_key_value of every layer."""
    folder = tmp_path / "lora"
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    config |= {
        "lora_dropout": 0.1,
        "target_modules": ["query_key_value"],
        "base_model_name_or_path": "THUDM/chatglm3-6b",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = {}
    for number in range(LAYERS):
        name = "base_model.model." + QKV.format(number).removesuffix(".weight")
        weights[f"{name}.lora_A.weight"] = noise(RANK, 256, seed=number)
        weights[f"{name}.lora_B.weight"] = noise(256 + 2 * GROUPS * HEAD, RANK, seed=10 + number)
    torch.save(weights, folder / "adapter_model.bin")
    return folder


@pytest.fixture
def prefix(toy_original, tmp_path):
    """As the tutorial's main.py saves it; `projected` with its MLP."""

    def write(projected=False, **changed):
        folder = tmp_path / "prefix"
        folder.mkdir()
        config = json.loads((toy_original / "config.json").read_text())
        config |= {"pre_seq_len": LENGTH, "prefix_projection": projected, **changed}
        (folder / "config.json").write_text(json.dumps(config))
        weights = {"embedding.weight": noise(LENGTH, VALUES, seed=0)}
        if projected:
            weights |= {"trans.0.weight": noise(256, VALUES, seed=1), "trans.0.bias": noise(256, seed=2)}
            weights |= {"trans.2.weight": noise(VALUES, 256, seed=3), "trans.2.bias": noise(VALUES, seed=4)}
        torch.save({PREFIX + name: tensor for name, tensor in weights.items()}, folder / "pytorch_model.bin")
        return folder

    return write


@pytest.fixture
def base(toy_native):
    return open_native(toy_native).model_config


def edit_json(file, **changed):
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def edit_weights(file, change):
    weights = torch.load(file) if file.suffix == ".bin" else load_file(file)
    change(weights)
    (torch.save if file.suffix == ".bin" else save_file)(weights, file)


def logits(engine, ids):
    with torch.no_grad():
        return engine.model(input_ids=torch.tensor([ids])).logits


FIRST_QKV = QKV.format(0).removesuffix(".weight")
SCALES = {  # fields of adapter_config.json, and the scale of the layers 0, 1, …
    "alpha": ({}, [ALPHA / RANK] * LAYERS),
    "use_rslora": ({"use_rslora": True}, [ALPHA / RANK**0.5] * LAYERS),
    "alpha_pattern": (
        {"alpha_pattern": {FIRST_QKV: 2, "3.self_attention.query_key_value": 40}},
        [2 / RANK, ALPHA / RANK, ALPHA / RANK, 40 / RANK],
    ),
    "rank_pattern": (
        {
            "r": 2,
            "rank_pattern": {"query_key_value": RANK},
            "alpha_pattern": {"layers.1.self_attention.query_key_value": 1},
        },
        [ALPHA / RANK, 1 / RANK, ALPHA / RANK, ALPHA / RANK],
    ),
}


@pytest.mark.parametrize("kind", SCALES)
def test_a_lora_gives_the_logits_of_the_original_weights_with_the_lora_merged(
    kind, lora, toy_original, toy_native, tmp_path
):
    """Expected: W + scale * B A on the fused projection, before any conversion."""
    fields, scales = SCALES[kind]
    edit_json(lora / "adapter_config.json", **fields)
    merged = shutil.copytree(toy_original, tmp_path / "merged")
    trained = torch.load(lora / "adapter_model.bin")
    for file in merged.glob("*.bin"):
        weights = {name: tensor.float() for name, tensor in torch.load(file).items()}
        for number, scale in enumerate(scales):
            half = "base_model.model." + QKV.format(number).replace("weight", "lora_{}.weight")
            if QKV.format(number) in weights:
                weights[QKV.format(number)] += scale * trained[half.format("B")] @ trained[half.format("A")]
        torch.save(weights, file)
    convert_to_native(merged, tmp_path / "merged-native", FORMAT)
    convert_adapter(lora, tmp_path / "adapter", toy_native, FORMAT)
    ids = list(range(300, 340))
    plain, adapted, expected = (
        logits(TransformersEngine.load(model, EngineOptions(adapter=adapter, device="cpu", dtype="float32")), ids)
        for model, adapter in [
            (toy_native, None),
            (toy_native, tmp_path / "adapter"),
            (tmp_path / "merged-native", None),
        ]
    )
    torch.testing.assert_close(adapted, expected, atol=1e-5, rtol=1e-5)
    assert (adapted - plain).abs().max() > 0.1


@pytest.mark.parametrize("projected", [False, True])
def test_a_prefix_becomes_keys_at_even_and_values_at_odd_indices(projected, prefix, tmp_path, base):
    """One value per layer, key or value, group and dimension of the head; the MLP is tanh between two linear layers."""
    source = prefix(projected)
    convert_adapter(source, tmp_path / "adapter", None, FORMAT)
    adapter = open_adapter(tmp_path / "adapter", base)
    stored = torch.load(source / "pytorch_model.bin")
    rows = stored[PREFIX + "embedding.weight"]
    if projected:
        rows = torch.tanh(rows @ stored[PREFIX + "trans.0.weight"].T + stored[PREFIX + "trans.0.bias"])
        rows = rows @ stored[PREFIX + "trans.2.weight"].T + stored[PREFIX + "trans.2.bias"]
    assert adapter.pre_seq_len == LENGTH
    for index, group, token in [(0, 0, 0), (1, 0, 0), (2, 1, 3), (7, 1, 2)]:
        start = (index * GROUPS + group) * HEAD
        torch.testing.assert_close(adapter.prefix()[index, group, token], rows[token, start : start + HEAD])


@pytest.mark.parametrize("projected", [False, True])
def test_a_prefix_needs_no_flag_and_changes_the_logits(projected, prefix, tmp_path, toy_native, toy_engine):
    """Its length is stored in adapter_config.json; nobody has to pass --pre_seq_len again."""
    convert_adapter(prefix(projected), tmp_path / "adapter", toy_native, FORMAT)
    engine = TransformersEngine.load(
        toy_native, EngineOptions(adapter=tmp_path / "adapter", device="cpu", dtype="float32")
    )
    assert (logits(engine, [300, 301]) - logits(toy_engine, [300, 301])).abs().max() > 0.1


def test_a_prefix_tuned_on_a_quantized_base_is_converted(prefix, tmp_path, base):
    """The tutorial's train.sh passes --quantization_bit 4; the saved config keeps it, the prefix is not quantized."""
    convert_adapter(prefix(quantization_bit=4), tmp_path / "adapter", None, FORMAT)
    assert open_adapter(tmp_path / "adapter", base).pre_seq_len == LENGTH


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_a_converted_adapter_has_its_own_prompt_format_and_a_manifest(kind, lora, prefix, toy_native, tmp_path, base):
    """Inference uses the prompt format that the adapter was tuned with, whatever that of its base."""
    prompt_format = PromptFormat("round", "写广告：")
    convert_adapter(lora if kind == "lora" else prefix(), tmp_path / "adapter", toy_native, prompt_format)
    assert open_adapter(tmp_path / "adapter", base).prompt_format == prompt_format
    engine = TransformersEngine.load(
        toy_native, EngineOptions(adapter=tmp_path / "adapter", device="cpu", dtype="float32")
    )
    assert engine.prompt_format == prompt_format
    assert check_manifest(tmp_path / "adapter", hashes=True) == 4


def test_adapters_are_distinguished_from_models(lora, prefix, toy_original, toy_native):
    assert [is_adapter(folder) for folder in (lora, prefix(), toy_original, toy_native)] == [True, True, False, False]


def test_a_folder_without_an_adapter_is_rejected(toy_original, toy_native, tmp_path):
    with pytest.raises(UserError, match="contains no adapter"):
        convert_adapter(toy_original, tmp_path / "adapter", toy_native, FORMAT)


def test_a_lora_without_its_base_is_rejected(lora, tmp_path):
    with pytest.raises(UserError, match="--base DIR"):
        convert_adapter(lora, tmp_path / "adapter", None, FORMAT)


FIRST = "base_model.model." + QKV.format(0).replace("weight", "lora_A.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.pop(FIRST),
            "only one of the factors lora_A and lora_B of .*layers.0.self_attn.k_proj",
        ),
        (lambda weights: weights.clear(), "no LoRA tensors"),
        (
            lambda weights: weights.update({"base_model.model.x.lora_A.weight": torch.zeros(4, 4)}),
            "which is not a LoRA factor of a weight matrix of the base model",
        ),
        (
            lambda weights: weights.update({FIRST: torch.zeros(4, 64)}),
            r"\[4, 64\], the base model and adapter_config\.json need \[4, 256\]",
        ),
        (
            lambda weights: weights.update({FIRST: torch.zeros(0)}),
            r"\[0\], the base model and adapter_config\.json need \[4, 256\]",
        ),
    ],
    ids=["one factor", "none", "unknown", "shape", "empty"],
)
def test_lora_tensors_that_do_not_fit_the_base_are_named(change, message, lora, toy_native, tmp_path):
    edit_weights(lora / "adapter_model.bin", change)
    with pytest.raises(UserError, match=message):
        convert_adapter(lora, tmp_path / "adapter", toy_native, FORMAT)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"a": 8}},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"peft_type": "IA3"},
    ],
    ids=str,
)
def test_a_lora_of_an_unsupported_kind_is_rejected_by_its_field(changed, lora, toy_native, tmp_path):
    edit_json(lora / "adapter_config.json", **changed)
    with pytest.raises(UserError, match=rf"adapter_config\.json: {next(iter(changed))} "):
        convert_adapter(lora, tmp_path / "adapter", toy_native, FORMAT)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", None])
def test_a_damaged_adapter_file_is_rejected_by_name(name, content, lora, toy_native, tmp_path):
    """None: truncated to half its size."""
    weights = torch.load(lora / "adapter_model.bin")
    (torch.save if name.endswith("bin") else save_file)(weights, lora / name)
    complete = (lora / name).read_bytes()
    (lora / name).write_bytes(complete[: len(complete) // 2] if content is None else content)
    with pytest.raises(UserError, match=name):
        convert_adapter(lora, tmp_path / "adapter", toy_native, FORMAT)


@pytest.mark.parametrize("changed", [{"pre_seq_len": 8}, {"prefix_projection": True}], ids=str)
def test_a_prefix_that_contradicts_its_config_is_rejected_with_both_sizes(changed, prefix, tmp_path):
    """Tuned with 4 positions, while config.json has 8 or an MLP."""
    with pytest.raises(
        UserError, match=rf"\({LENGTH}, {VALUES}\).* need .*\({changed.get('pre_seq_len', LENGTH)}, {VALUES}\)"
    ):
        convert_adapter(prefix(**changed), tmp_path / "adapter", None, FORMAT)


@pytest.fixture
def converted(lora, prefix, toy_native, tmp_path):
    """A native adapter of each kind."""
    convert_adapter(lora, tmp_path / "native-lora", toy_native, FORMAT)
    convert_adapter(prefix(), tmp_path / "native-prefix", toy_native, FORMAT)
    return {"lora": tmp_path / "native-lora", "prefix": tmp_path / "native-prefix"}


def test_a_native_prefix_of_another_length_than_configured_is_rejected_with_both(converted, base):
    """Tuned with 4 positions, configured with 8."""
    edit_json(converted["prefix"] / "adapter_config.json", pre_seq_len=8)
    with pytest.raises(UserError, match=r"\[8, 2, 4, 32\], .* need \[8, 2, 8, 32\]"):
        open_adapter(converted["prefix"], base)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("lora", "hidden_size"),
        ("lora", "num_layers"),
        ("lora", "num_kv_heads"),
        ("prefix", "num_layers"),
        ("prefix", "num_kv_heads"),
    ],
)
def test_an_adapter_for_a_base_of_another_size_is_rejected(kind, change, converted, base):
    other = type(base)(**{**vars(base), change: getattr(base, change) // 2})
    with pytest.raises(UserError, match="the base model"):
        open_adapter(converted[kind], other)


@pytest.mark.parametrize(("kind", "file"), [("lora", "adapter_model.safetensors"), ("prefix", "prefix.safetensors")])
def test_a_native_adapter_without_intact_weights_is_rejected(kind, file, converted, base):
    complete = (converted[kind] / file).read_bytes()
    for content in (complete[:-10], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        (converted[kind] / file).write_bytes(content)
        with pytest.raises(UserError, match=file):
            open_adapter(converted[kind], base)
    (converted[kind] / file).unlink()
    with pytest.raises(UserError, match=file):
        open_adapter(converted[kind], base)


def test_a_native_lora_without_one_of_its_factors_is_rejected(converted, base):
    edit_weights(converted["lora"] / "adapter_model.safetensors", lambda weights: weights.pop(next(iter(weights))))
    with pytest.raises(UserError, match="only one of the factors"):
        open_adapter(converted["lora"], base)


def test_an_adapter_in_the_original_layout_is_rejected_with_the_conversion_command(lora, prefix, base, tmp_path):
    """Otherwise the base model would run without the adapter."""
    for folder in (lora, prefix()):
        with pytest.raises(UserError, match="convert"):
            open_adapter(folder, base)
    with pytest.raises(UserError, match=r"folder not found: .*nothing"):
        open_adapter(tmp_path / "nothing", base)
