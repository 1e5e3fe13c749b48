"""LoRA and P-Tuning v2 adapters of the toy. Trap names (B2, B3, B6, B7) are those of the list of reported pains."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from entrypoints.checkpoint.adapters import convert_adapter, is_adapter, open_adapter
from entrypoints.checkpoint.conversion import convert_to_native
from entrypoints.checkpoint.manifest import check_manifest
from entrypoints.checkpoint.native import open_native
from entrypoints.engines.transformers_engine import TransformersEngine
from entrypoints.errors import UserError
from entrypoints.prompt import PromptFormat

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
    """As the official fine-tuning script saves one: query_key_value of every layer."""
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
    """As the tutorial's main.py saves one; `projected` with its MLP."""

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
    return open_native(toy_native).shape


def edit_json(file, **changed):
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def edit_weights(file, change):
    weights = torch.load(file) if file.suffix == ".bin" else load_file(file)
    change(weights)
    (torch.save if file.suffix == ".bin" else save_file)(weights, file)


def logits(engine, ids):
    with torch.no_grad():
        return engine.model(input_ids=torch.tensor([ids])).logits


def test_a_lora_gives_the_logits_of_the_original_weights_with_the_lora_merged(lora, toy_original, toy_native, tmp_path):
    """B7: W + alpha / r * B A on the fused projection, before anything is converted."""
    merged = shutil.copytree(toy_original, tmp_path / "merged")
    trained = torch.load(lora / "adapter_model.bin")
    for file in merged.glob("*.bin"):
        weights = {name: tensor.float() for name, tensor in torch.load(file).items()}
        for number in range(LAYERS):
            half = "base_model.model." + QKV.format(number).replace("weight", "lora_{}.weight")
            if QKV.format(number) in weights:
                weights[QKV.format(number)] += ALPHA / RANK * trained[half.format("B")] @ trained[half.format("A")]
        torch.save(weights, file)
    convert_to_native(merged, tmp_path / "merged-native", FORMAT)
    convert_adapter(lora, tmp_path / "adapter", toy_native, FORMAT)
    ids = list(range(300, 340))
    plain, adapted, expected = (
        logits(TransformersEngine.load(model, adapter, device="cpu", dtype="float32"), ids)
        for model, adapter in [
            (toy_native, None),
            (toy_native, tmp_path / "adapter"),
            (tmp_path / "merged-native", None),
        ]
    )
    torch.testing.assert_close(adapted, expected, atol=1e-5, rtol=1e-5)
    assert (adapted - plain).abs().max() > 0.1


@pytest.mark.parametrize("projected", [False, True])
def test_a_prefix_becomes_keys_at_even_and_values_at_odd_places(projected, prefix, tmp_path, base):
    """One number per layer, key or value, group and dimension of the head; the MLP is tanh between two layers."""
    source = prefix(projected)
    convert_adapter(source, tmp_path / "adapter", None, FORMAT)
    adapter = open_adapter(tmp_path / "adapter", base)
    stored = torch.load(source / "pytorch_model.bin")
    rows = stored[PREFIX + "embedding.weight"]
    if projected:
        rows = torch.tanh(rows @ stored[PREFIX + "trans.0.weight"].T + stored[PREFIX + "trans.0.bias"])
        rows = rows @ stored[PREFIX + "trans.2.weight"].T + stored[PREFIX + "trans.2.bias"]
    assert adapter.pre_seq_len == LENGTH
    for place, group, token in [(0, 0, 0), (1, 0, 0), (2, 1, 3), (7, 1, 2)]:
        start = (place * GROUPS + group) * HEAD
        torch.testing.assert_close(adapter.prefix()[place, group, token], rows[token, start : start + HEAD])


@pytest.mark.parametrize("projected", [False, True])
def test_a_prefix_needs_no_flag_and_changes_what_the_model_says(projected, prefix, tmp_path, toy_native, toy_engine):
    """B6: its length is stored beside it."""
    convert_adapter(prefix(projected), tmp_path / "adapter", toy_native, FORMAT)
    engine = TransformersEngine.load(toy_native, tmp_path / "adapter", device="cpu", dtype="float32")
    assert (logits(engine, [300, 301]) - logits(toy_engine, [300, 301])).abs().max() > 0.1


def test_a_prefix_tuned_on_a_quantised_base_is_converted(prefix, tmp_path, base):
    """The tutorial's train.sh says --quantization_bit 4, and the saved config keeps it; the prefix is not quantised."""
    convert_adapter(prefix(quantization_bit=4), tmp_path / "adapter", None, FORMAT)
    assert open_adapter(tmp_path / "adapter", base).pre_seq_len == LENGTH


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_a_converted_adapter_brings_its_prompt_format_and_a_manifest(kind, lora, prefix, toy_native, tmp_path, base):
    """F8: the adapter is asked as it was taught, whatever its base was taught."""
    prompt_format = PromptFormat("round", "写广告：")
    convert_adapter(lora if kind == "lora" else prefix(), tmp_path / "adapter", toy_native, prompt_format)
    assert open_adapter(tmp_path / "adapter", base).prompt_format == prompt_format
    engine = TransformersEngine.load(toy_native, tmp_path / "adapter", device="cpu", dtype="float32")
    assert engine.prompt_format == prompt_format
    assert check_manifest(tmp_path / "adapter", hashes=True) == 4


def test_adapters_are_told_from_models(lora, prefix, toy_original, toy_native):
    assert [is_adapter(folder) for folder in (lora, prefix(), toy_original, toy_native)] == [True, True, False, False]


def test_a_folder_without_an_adapter_is_refused(toy_original, toy_native, tmp_path):
    with pytest.raises(UserError, match="holds no adapter"):
        convert_adapter(toy_original, tmp_path / "adapter", toy_native, FORMAT)


def test_a_lora_without_its_base_is_refused(lora, tmp_path):
    with pytest.raises(UserError, match="--base DIR"):
        convert_adapter(lora, tmp_path / "adapter", None, FORMAT)


FIRST = "base_model.model." + QKV.format(0).replace("weight", "lora_A.weight")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop(FIRST), "only half a LoRA of .*layers.0.self_attn.k_proj"),
        (lambda weights: weights.clear(), "no LoRA tensors"),
        (lambda weights: weights.update({"base_model.model.x.lora_A.weight": torch.zeros(4, 4)}), "no place for"),
        (lambda weights: weights.update({FIRST: torch.zeros(4, 64)}), r"\[4, 64\], the base model needs \[4, 256\]"),
        (lambda weights: weights.update({FIRST: torch.zeros(0)}), r"\[0\], the base model needs \[4, 256\]"),
    ],
    ids=["half", "none", "unknown", "shape", "empty"],
)
def test_lora_tensors_that_do_not_fit_the_base_are_named(change, words, lora, toy_native, tmp_path):
    """B3."""
    edit_weights(lora / "adapter_model.bin", change)
    with pytest.raises(UserError, match=words):
        convert_adapter(lora, tmp_path / "adapter", toy_native, FORMAT)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"a": 8}},
        {"use_dora": True},
        {"peft_type": "IA3"},
    ],
    ids=str,
)
def test_a_lora_of_another_kind_is_refused(changed, lora, toy_native, tmp_path):
    edit_json(lora / "adapter_config.json", **changed)
    with pytest.raises(UserError, match=r"adapter_config\.json is no plain LoRA"):
        convert_adapter(lora, tmp_path / "adapter", toy_native, FORMAT)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", None])
def test_a_damaged_adapter_file_is_refused_by_name(name, content, lora, toy_native, tmp_path):
    """B2; None: cut in the middle."""
    weights = torch.load(lora / "adapter_model.bin")
    (torch.save if name.endswith("bin") else save_file)(weights, lora / name)
    whole = (lora / name).read_bytes()
    (lora / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(UserError, match=name):
        convert_adapter(lora, tmp_path / "adapter", toy_native, FORMAT)


@pytest.mark.parametrize("changed", [{"pre_seq_len": 8}, {"prefix_projection": True}], ids=str)
def test_a_prefix_other_than_its_config_says_is_refused_with_both_sizes(changed, prefix, tmp_path):
    """B6: tuned with 4, said to be 8."""
    with pytest.raises(
        UserError, match=rf"\({LENGTH}, {VALUES}\).* say .*\({changed.get('pre_seq_len', LENGTH)}, {VALUES}\)"
    ):
        convert_adapter(prefix(**changed), tmp_path / "adapter", None, FORMAT)


@pytest.fixture
def converted(lora, prefix, toy_native, tmp_path):
    """Both kinds, native."""
    convert_adapter(lora, tmp_path / "native-lora", toy_native, FORMAT)
    convert_adapter(prefix(), tmp_path / "native-prefix", toy_native, FORMAT)
    return {"lora": tmp_path / "native-lora", "prefix": tmp_path / "native-prefix"}


def test_a_prefix_of_another_length_than_configured_is_refused_with_both(converted, base):
    """B6: tuned with 4, served with 8."""
    edit_json(converted["prefix"] / "adapter_config.json", pre_seq_len=8)
    with pytest.raises(UserError, match=r"\[8, 2, 4, 32\], .* need \[8, 2, 8, 32\]"):
        open_adapter(converted["prefix"], base)


@pytest.mark.parametrize(
    ("kind", "change"),
    [("lora", "hidden"), ("lora", "layers"), ("lora", "groups"), ("prefix", "layers"), ("prefix", "groups")],
)
def test_an_adapter_for_a_base_of_another_size_is_refused(kind, change, converted, base):
    other = type(base)(**{**vars(base), change: getattr(base, change) // 2})
    with pytest.raises(UserError, match="the base model"):
        open_adapter(converted[kind], other)


@pytest.mark.parametrize(("kind", "file"), [("lora", "adapter_model.safetensors"), ("prefix", "prefix.safetensors")])
def test_a_native_adapter_that_lost_its_weights_is_refused(kind, file, converted, base):
    whole = (converted[kind] / file).read_bytes()
    for content in (whole[:-10], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        (converted[kind] / file).write_bytes(content)
        with pytest.raises(UserError, match=file):
            open_adapter(converted[kind], base)
    (converted[kind] / file).unlink()
    with pytest.raises(UserError, match=file):
        open_adapter(converted[kind], base)


def test_a_native_lora_without_one_of_its_halves_is_refused(converted, base):
    edit_weights(converted["lora"] / "adapter_model.safetensors", lambda weights: weights.pop(next(iter(weights))))
    with pytest.raises(UserError, match="only half a LoRA"):
        open_adapter(converted["lora"], base)


def test_an_adapter_in_the_original_layout_is_sent_to_conversion(lora, prefix, base, tmp_path):
    """B7: neither is served as if it were not there."""
    for folder in (lora, prefix()):
        with pytest.raises(UserError, match="convert"):
            open_adapter(folder, base)
    with pytest.raises(UserError, match="nothing is no folder"):
        open_adapter(tmp_path / "nothing", base)
