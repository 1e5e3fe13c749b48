"""A GGUF file compared with its source: layer by layer, with a LoRA, and with an importance matrix."""

import gc
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from entrypoints.checkpoint.adapters import open_adapter
from entrypoints.checkpoint.gguf_reader import GGUF_TYPES, IMATRIX_TYPES, PROVENANCE_KEY, open_gguf
from entrypoints.checkpoint.native import open_native
from entrypoints.dataset.reader import Example
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.errors import UserError
from entrypoints.hardware import placement
from entrypoints.quantization import divergence, layerwise_forward, merge_check, to_gguf
from entrypoints.quantization.divergence import measure_file, require_small_divergence
from entrypoints.quantization.gguf_writer import GgufOptions, write_gguf
from entrypoints.quantization.imatrix import importance_matrix
from entrypoints.quantization.layerwise_forward import LayerwiseModel, require_layer_memory
from entrypoints.quantization.merge_check import require_equal_merge
from entrypoints.quantization.tensor_types import plan_tensor_types
from entrypoints.quantization.to_gguf import QuantizeOptions, quantize

PROMPTS = [[300, 301, 302, 303, 304], [310, 311]]
LOGIT_SCALE = 8  # makes the probabilities of the untrained model as uneven as those of a trained one


def copy_with_changed_weights(toy_native, folder, change):
    """A copy without the manifest, which would detect the change."""
    shutil.copytree(toy_native, folder)
    (folder / "manifest.json").unlink(missing_ok=True)
    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def sharp(toy_native, tmp_path_factory):
    return copy_with_changed_weights(
        toy_native,
        tmp_path_factory.mktemp("sharp") / "native",
        lambda weights: weights["lm_head.weight"].mul_(LOGIT_SCALE),
    )


@pytest.fixture(scope="module")
def sharp_file(sharp, tmp_path_factory):
    """Quantize `sharp` to a type, once per type: the file, and what `quantize` returned."""
    folder, results = tmp_path_factory.mktemp("sharp-files"), {}

    def create(type_):
        file = folder / f"{type_}.gguf"
        if type_ not in results:
            results[type_] = quantize(QuantizeOptions(sharp, file, type_))
        return file, *results[type_]

    return create


@pytest.fixture(scope="module")
def lora(toy_native, tmp_path_factory):
    """A LoRA that changes every layer, for `toy_native` and for `sharp`."""
    folder, model_config = tmp_path_factory.mktemp("lora"), open_native(toy_native).model_config
    generator = torch.Generator().manual_seed(1)
    sizes = {
        "self_attn.q_proj": (model_config.qkv_rows[0], model_config.hidden_size),
        "self_attn.v_proj": (model_config.qkv_rows[2], model_config.hidden_size),
        "self_attn.o_proj": (model_config.hidden_size, model_config.qkv_rows[0]),
        "mlp.down_proj": (model_config.hidden_size, model_config.intermediate_size),
    }
    halves = {}
    for layer in range(model_config.num_layers):
        for name, (rows, columns) in sizes.items():
            stem = f"base_model.model.model.layers.{layer}.{name}.lora_"
            halves[f"{stem}A.weight"] = torch.randn((4, columns), generator=generator) * 0.1
            halves[f"{stem}B.weight"] = torch.randn((rows, 4), generator=generator) * 0.1
    save_file(halves, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": 4, "lora_alpha": 8}
    targets = sorted(name.partition(".")[2] for name in sizes)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
    return folder


def provenance(file):
    return json.loads(gguf.GGUFReader(file).get_field(PROVENANCE_KEY).contents())


def logits(checkpoint, **options):
    model = LayerwiseModel(checkpoint, **options)
    return model.logits(model.hidden_states(PROMPTS))


@torch.inference_mode()
def full_model_logits(model):
    return [model(input_ids=torch.tensor([prompt])).logits[0] for prompt in PROMPTS]


def test_the_layerwise_forward_gives_the_logits_of_the_full_model(toy_native, toy_engine):
    for found, whole in zip(logits(open_native(toy_native)), full_model_logits(toy_engine.model), strict=True):
        assert torch.allclose(found, whole, atol=1e-5)


@pytest.mark.parametrize("way", ["merged", "by_peft"])
def test_a_lora_merged_or_not_gives_the_logits_of_peft(way, lora, toy_native):
    base = open_native(toy_native)
    engine = TransformersEngine.load(toy_native, EngineOptions(device="cpu", dtype="float32"))
    plain = full_model_logits(engine.model)
    tuned = full_model_logits(PeftModel.from_pretrained(engine.model, lora).eval())
    for found, whole, other in zip(
        logits(base, **{way: open_adapter(lora, base.model_config)}), tuned, plain, strict=True
    ):
        assert torch.allclose(found, whole, atol=1e-4)
        assert not torch.allclose(found, other, atol=1e-2)


@pytest.mark.parametrize("fault", ["scale", "one layer"])
def test_a_merge_that_peft_computes_otherwise_is_rejected(fault, lora, toy_native, monkeypatch):
    """The settings of the merge are read wrongly; PEFT reads them itself, so the check does not repeat the fault."""
    base = open_native(toy_native)
    adapter = open_adapter(lora, base.model_config)
    require_equal_merge(base, adapter, torch.float32)
    factors = adapter.lora_factors()
    wrong = {name: factor for name, factor in factors.items() if fault == "scale" or "layers.1." in name}
    for name, factor in wrong.items():
        factors[name] = factor._replace(scale=factor.scale * 4)
    monkeypatch.setattr(type(adapter), "lora_factors", lambda adapter: factors)
    with pytest.raises(UserError, match=r"merging .* in float32 changes the logits by .* --adapter"):
        require_equal_merge(base, adapter, torch.bfloat16)


def test_weights_that_rounding_changes_too_much_are_rejected_with_a_remedy_that_helps(lora, toy_native, monkeypatch):
    base = open_native(toy_native)
    adapter = open_adapter(lora, base.model_config)
    monkeypatch.setitem(merge_check.MAX_DIFFERENCE, torch.bfloat16, 1e-5)
    with pytest.raises(UserError, match=r"in bfloat16 changes the logits by .*glm export --dtype float32"):
        require_equal_merge(base, adapter, torch.bfloat16)
    require_equal_merge(base, adapter, torch.float32)


def test_the_importance_of_a_column_is_the_mean_square_of_its_input(toy_native, monkeypatch):
    monkeypatch.setattr("entrypoints.quantization.imatrix.cpu_has_native_bf16", lambda: False)
    model = TransformersEngine.load(toy_native, EngineOptions(device="cpu", dtype="float32")).model
    seen = {}
    for name in ("model.layers.2.mlp.down_proj", "model.layers.0.self_attn.q_proj", "lm_head"):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, given, name=name: seen.setdefault(name, []).append(given[0][0]))
    full_model_logits(model)
    found = importance_matrix(open_native(toy_native), PROMPTS)
    assert len(found) == 4 * 6 + 1  # q, k, v, o, gate_up and down of four layers, and the output layer
    for name, inputs in seen.items():
        assert np.allclose(found[f"{name}.weight"], torch.cat(inputs).square().mean(0).numpy(), rtol=1e-4)


@pytest.mark.parametrize("type_", GGUF_TYPES)
def test_the_divergence_of_each_type_is_below_its_limit(type_, sharp_file):
    file, size, found = sharp_file(type_)
    assert size == file.stat().st_size
    assert 0 <= found.mean_kl <= divergence.MAX_MEAN_KL[type_]
    assert 5 <= found.tokens <= 5 * divergence.ANSWER_TOKENS
    assert found.matching_tokens > found.tokens / 2
    assert set(GGUF_TYPES) <= set(divergence.MAX_MEAN_KL)


def test_float16_chooses_the_tokens_of_its_source(sharp_file):
    _, _, found = sharp_file("f16")
    assert found.mean_kl < 1e-4
    assert found.matching_tokens >= found.tokens - 1  # a tie may be resolved differently


def test_the_file_of_another_model_is_above_the_limit(sharp, sharp_file, tmp_path):
    def shuffle(weights):
        weights["lm_head.weight"] = weights["lm_head.weight"].flip(0)

    file, _, found = sharp_file("q8_0")
    require_small_divergence(found, "q8_0")
    other = open_native(copy_with_changed_weights(sharp, tmp_path / "other", shuffle))
    with pytest.raises(UserError, match="the q8_0 model differs too much from its source: mean KL"):
        require_small_divergence(measure_file(file, other), "q8_0")


@pytest.mark.slow
def test_weights_that_four_bits_cannot_represent_leave_no_file(toy_native, tmp_path):
    """A large column in each block of 32, compensated in the rows before it: the other values of a block become 0."""

    def outliers(weights):
        weights["lm_head.weight"].mul_(LOGIT_SCALE)
        for name in [name for name in weights if name.endswith("down_proj.weight")]:
            weights[name].mul_(30)
            weights[name][:, ::32] *= 300
            up = weights[name.replace("down", "gate_up")]
            up[up.shape[0] // 2 :: 32] /= 300

    folder = copy_with_changed_weights(toy_native, tmp_path / "native", outliers)
    quantize(QuantizeOptions(folder, tmp_path / "out-f16.gguf", "f16"))
    with pytest.raises(UserError, match=r"the q4_0 model differs too much from its source.*use a type with more bits"):
        quantize(QuantizeOptions(folder, tmp_path / "out.gguf", "q4_0"))
    assert {path.name for path in tmp_path.iterdir()} == {"native", "out-f16.gguf"}


@pytest.mark.slow
def test_a_merged_lora_is_in_the_weights_and_in_the_provenance(lora, sharp, tmp_path):
    _, found = quantize(QuantizeOptions(sharp, tmp_path / "out.gguf", "f16", adapter=lora))
    assert found.mean_kl < 1e-3  # from the base with the LoRA computed separately
    assert measure_file(tmp_path / "out.gguf", open_native(sharp)).mean_kl > 0.1  # from the base alone
    assert provenance(tmp_path / "out.gguf")["adapter"] == lora.name


def test_a_lora_with_patterns_is_in_the_file_as_peft_applies_it(lora, sharp, tmp_path):
    """llama.cpp answers with the merged file; the source is the base model with the LoRA of PEFT."""
    copy = shutil.copytree(lora, tmp_path / "lora")
    config = json.loads((copy / "adapter_config.json").read_text())
    patterns = {"use_rslora": True, "alpha_pattern": {"q_proj": 1, "layers.2.mlp.down_proj": 20}}
    (copy / "adapter_config.json").write_text(json.dumps(config | patterns))
    _, found = quantize(QuantizeOptions(sharp, tmp_path / "out.gguf", "f16", adapter=copy))
    assert found.mean_kl < 1e-3
    plain = open_adapter(lora, open_native(sharp).model_config)
    assert measure_file(tmp_path / "out.gguf", open_native(sharp), plain).mean_kl > 0.05


def test_what_writing_needs_is_required_before_the_slow_checks(lora, sharp, tmp_path, monkeypatch):
    monkeypatch.setattr(to_gguf, "require_equal_merge", None)  # not called
    copy = shutil.copytree(sharp, tmp_path / "native")
    (copy / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"file not found: .*tokenizer\.model"):
        quantize(QuantizeOptions(copy, tmp_path / "out.gguf", "f16", adapter=lora))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"needs \S+ [kM]B, its disk has .* free"):
        quantize(QuantizeOptions(sharp, tmp_path / "out.gguf", "f16", adapter=lora))
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


def dequantized(file):
    """Name -> float64 values of each tensor of a GGUF file."""
    tensors = gguf.GGUFReader(file).tensors
    return {one.name: gguf.dequantize(one.data, one.tensor_type).astype(np.float64) for one in tensors}


@pytest.mark.slow
@pytest.mark.parametrize("type_", IMATRIX_TYPES)
def test_an_importance_matrix_reduces_the_error_that_its_rows_see(type_, sharp, sample_rows, tmp_path):
    """The squared error of every matrix, each column weighted by its importance."""
    checkpoint = open_native(sharp)
    rows = [checkpoint.tokenizer.encode(row["content"] + row["summary"]) for row in sample_rows[:8]]
    weights = importance_matrix(checkpoint, rows)
    for name, importance in (("plain", {}), ("weighted", weights)):
        write_gguf(sharp, tmp_path / f"{name}.gguf", type_, GgufOptions(None, importance))
    write_gguf(sharp, tmp_path / "f16.gguf", "f16")
    exact, plain, weighted = (dequantized(tmp_path / f"{name}.gguf") for name in ("f16", "plain", "weighted"))
    column_weights = {
        plan.name: weights.get(plan.entry.native[0]) for plan in plan_tensor_types(checkpoint.model_config, type_)
    }
    measured = {name: column for name, column in column_weights.items() if column is not None}
    assert len(measured) == 4 * 4 + 1  # qkv, dense, gate and up, down of four layers, and the output layer

    def error(found):
        return sum((((found[name] - exact[name]) ** 2) * measured[name]).sum() for name in measured)

    assert error(weighted) < 0.98 * error(plain)


def test_the_file_of_the_importance_matrix_is_in_the_provenance(sharp, sample_rows, tmp_path):
    rows = [Example(Path("mine.jsonl"), 1, 0, row["content"], row["summary"]) for row in sample_rows[:16]]
    quantize(QuantizeOptions(sharp, tmp_path / "weighted.gguf", "q4_k_m", rows=rows, rows_source="mine.jsonl"))
    assert provenance(tmp_path / "weighted.gguf")["imatrix"] == "mine.jsonl"
    assert open_gguf(tmp_path / "weighted.gguf").type == "q4_k_m"


def test_rows_are_rejected_for_types_without_an_importance_matrix(sharp, tmp_path):
    rows = [Example(Path("mine.jsonl"), 1, 0, "问", "答")]
    with pytest.raises(UserError, match=r"--imatrix has no effect on --type q8_0"):
        quantize(QuantizeOptions(sharp, tmp_path / "out.gguf", "q8_0", rows=rows))


def test_rows_that_exceed_the_memory_are_rejected_with_the_number_that_fits(sharp, sample_rows, tmp_path, monkeypatch):
    rows = [Example(Path("mine.jsonl"), 1, 0, row["content"], row["summary"]) for row in sample_rows[:16]]
    checkpoint = open_native(sharp)
    needed = require_layer_memory(checkpoint, "")
    encoded = to_gguf._encode_rows(rows, checkpoint, None)
    work = max(map(len, encoded)) * 5 * checkpoint.model_config.intermediate_size * 4
    ten = needed + work + sum(map(len, encoded[:10])) * checkpoint.model_config.hidden_size * 4
    monkeypatch.setattr(to_gguf, "importance_matrix", None)  # not called before the check
    for free, remedy in ((ten, "use --imatrix-rows 10"), (needed + 1, "not even one row fits")):
        for module in (to_gguf, layerwise_forward):
            monkeypatch.setattr(module, "available_memory", lambda free=free: free)
        with pytest.raises(UserError, match=rf"importance matrix of 16 rows needs \d+\.\d\d MB .*{re.escape(remedy)}"):
            quantize(QuantizeOptions(sharp, tmp_path / "out.gguf", "q4_0", rows=rows))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("way", [None, "merged", "by_peft"])
def test_one_layer_and_one_hidden_state_per_row_are_in_memory(way, lora, toy_native):
    """The memory check counts one hidden state per row; two copies would take twice that."""
    checkpoint, observed, live = open_native(toy_native), [], []
    rows = [[300 + number] * 37 for number in range(24)]
    state, matrix = (
        (1, 37, checkpoint.model_config.hidden_size),
        (checkpoint.model_config.hidden_size, checkpoint.model_config.intermediate_size),
    )

    def count():
        tensors = (one for one in gc.get_objects() if issubclass(type(one), torch.Tensor))
        shapes = [tuple(one.shape) for one in tensors if one.device.type != "meta"]  # which has no data
        return shapes.count(state), shapes.count(matrix)

    def observe(name, _):
        if name.endswith("down_proj.weight"):
            observed.append(name)
            if len(observed) % 24 == 0:  # the peak is at the last row of a layer
                live.append(count())

    _, others = count()  # models of other tests
    options = {way: open_adapter(lora, checkpoint.model_config)} if way else {}
    LayerwiseModel(checkpoint, **options).hidden_states(rows, observe)
    assert len(live) == 4
    assert max(states for states, _ in live) <= 24 + 6  # plus the intermediate states of the current row
    assert max(matrices for _, matrices in live) == others + 1


@pytest.mark.parametrize("output", ["file", "folder"])
def test_threads_are_limited_to_the_cpu_quota_before_any_computation(output, sharp, tmp_path, monkeypatch):
    from entrypoints.quantization import to_bitsandbytes

    def stop(*_):
        seen.append(torch.get_num_threads())
        raise UserError("stopped by the test", "")

    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr(placement, "available_cpus", lambda: 1)
    for module in (to_gguf, to_bitsandbytes):
        monkeypatch.setattr(module, "open_native", stop)
    run = {
        "file": lambda: quantize(QuantizeOptions(sharp, tmp_path / "out.gguf", "q4_0")),
        "folder": lambda: to_bitsandbytes.quantize_folder(sharp, tmp_path / "out", "int8"),
    }[output]
    torch.set_num_threads(2)
    try:
        with pytest.raises(UserError, match="stopped by the test"):
            run()
    finally:
        torch.set_num_threads(before)
    assert seen == [1]
