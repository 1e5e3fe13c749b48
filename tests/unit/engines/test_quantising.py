"""A GGUF file against its source: layer by layer, with a LoRA, weighed by rows, and refused when it is another."""

import gc
import json
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from entrypoints.checkpoint.adapters import lora_halves, open_adapter
from entrypoints.checkpoint.gguf import PROVENANCE_KEY, TYPES, WEIGHED, open_gguf
from entrypoints.checkpoint.gguf_plan import plans
from entrypoints.checkpoint.gguf_writing import Extras, write_gguf
from entrypoints.checkpoint.native import open_native
from entrypoints.dataset.reading import Example
from entrypoints.engines import gguf_check, placement, quantising
from entrypoints.engines.gguf_check import compare, require_merged, require_near
from entrypoints.engines.importance import importance
from entrypoints.engines.layerwise import Layerwise
from entrypoints.engines.quantising import Order, quantise
from entrypoints.engines.transformers_engine import TransformersEngine
from entrypoints.errors import UserError

PROMPTS = [[300, 301, 302, 303, 304], [310, 311]]
SHARP = 8  # makes the untrained toy's odds as far apart as a trained model's


def changed(toy_native, folder, change):
    """A copy of the toy with other weights, without the manifest that would notice."""
    shutil.copytree(toy_native, folder)
    (folder / "manifest.json").unlink(missing_ok=True)
    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def sharp(toy_native, tmp_path_factory):
    return changed(
        toy_native, tmp_path_factory.mktemp("sharp") / "native", lambda weights: weights["lm_head.weight"].mul_(SHARP)
    )


@pytest.fixture(scope="module")
def lora(toy_native, tmp_path_factory):
    """One that changes every layer; it fits both the toy and the sharp one."""
    folder, shape = tmp_path_factory.mktemp("lora"), open_native(toy_native).shape
    generator = torch.Generator().manual_seed(1)
    sizes = {
        "self_attn.q_proj": (shape.qkv_rows[0], shape.hidden),
        "self_attn.v_proj": (shape.qkv_rows[2], shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.qkv_rows[0]),
        "mlp.down_proj": (shape.hidden, shape.ffn),
    }
    halves = {}
    for layer in range(shape.layers):
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


def logits(checkpoint, *args):
    run = Layerwise(checkpoint, *args)
    return run.logits(run.hidden(PROMPTS))


@torch.inference_mode()
def expected(model):
    return [model(input_ids=torch.tensor([prompt])).logits[0] for prompt in PROMPTS]


def test_layer_by_layer_gives_the_whole_models_logits(toy_native, toy_engine):
    for found, whole in zip(logits(open_native(toy_native)), expected(toy_engine.model), strict=True):
        assert torch.allclose(found, whole, atol=1e-5)


@pytest.mark.parametrize("beside", [True, False])
def test_a_lora_gives_pefts_logits_merged_or_beside_its_base(beside, lora, toy_native):
    base = open_native(toy_native)
    engine = TransformersEngine.load(toy_native, device="cpu", dtype="float32")
    plain = expected(engine.model)
    tuned = expected(PeftModel.from_pretrained(engine.model, lora).eval())
    for found, whole, other in zip(logits(base, open_adapter(lora, base.shape), beside), tuned, plain, strict=True):
        assert torch.allclose(found, whole, atol=1e-4)
        assert not torch.allclose(found, other, atol=1e-2)


def test_a_merge_that_says_something_else_is_refused(lora, toy_native, monkeypatch):
    """A wrong scale, as when alpha is taken for the factor."""
    base = open_native(toy_native)
    adapter = open_adapter(lora, base.shape)
    require_merged(base, adapter)
    halves, scale = lora_halves(adapter)
    monkeypatch.setattr("entrypoints.checkpoint.adapters.lora_halves", lambda adapter: (halves, scale * 4))
    with pytest.raises(UserError, match=r"merging .* moves the logits by"):
        require_merged(base, adapter)


def test_the_importance_of_a_column_is_the_mean_square_of_what_it_is_multiplied_with(toy_native, monkeypatch):
    monkeypatch.setattr("entrypoints.engines.importance.cpu_computes_bf16", lambda: False)
    model = TransformersEngine.load(toy_native, device="cpu", dtype="float32").model
    seen = {}
    for name in ("model.layers.2.mlp.down_proj", "model.layers.0.self_attn.q_proj", "lm_head"):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, given, name=name: seen.setdefault(name, []).append(given[0][0]))
    expected(model)
    found = importance(open_native(toy_native), PROMPTS)
    assert len(found) == 4 * 6 + 1  # q, k, v, o, gate_up and down of four layers, and the output layer
    for name, inputs in seen.items():
        assert np.allclose(found[f"{name}.weight"], torch.cat(inputs).square().mean(0).numpy(), rtol=1e-4)


@pytest.mark.parametrize("type_", TYPES)
def test_a_file_of_each_type_is_near_its_source(type_, sharp, tmp_path):
    size, found = quantise(Order(sharp, tmp_path / "out.gguf", type_))
    assert size == (tmp_path / "out.gguf").stat().st_size
    assert 0 <= found.divergence <= gguf_check.BOUNDS[type_]
    assert 5 <= found.tokens <= 5 * gguf_check.ANSWER_TOKENS
    assert found.same > found.tokens / 2
    assert set(TYPES) <= set(gguf_check.BOUNDS)


def test_half_precision_chooses_every_token_as_its_source(sharp, tmp_path):
    _, found = quantise(Order(sharp, tmp_path / "out.gguf", "f16"))
    assert found.divergence < 1e-4
    assert found.same >= found.tokens - 1  # a tie may fall the other way


def test_the_file_of_another_model_is_not_near(sharp, tmp_path):
    def shuffle(weights):
        weights["lm_head.weight"] = weights["lm_head.weight"].flip(0)

    _, found = quantise(Order(sharp, tmp_path / "out.gguf", "q8_0"))
    require_near(found, "q8_0")
    other = open_native(changed(sharp, tmp_path / "other", shuffle))
    with pytest.raises(UserError, match="the q8_0 model is not its source: mean KL"):
        require_near(compare(tmp_path / "out.gguf", other), "q8_0")


def test_weights_that_four_bits_cannot_hold_leave_no_file(toy_native, tmp_path):
    """One large column in each block of 32, small rows before it: the same model, and the block's others become 0."""

    def outliers(weights):
        weights["lm_head.weight"].mul_(SHARP)
        for name in [name for name in weights if name.endswith("down_proj.weight")]:
            weights[name].mul_(30)
            weights[name][:, ::32] *= 300
            up = weights[name.replace("down", "gate_up")]
            up[up.shape[0] // 2 :: 32] /= 300

    folder = changed(toy_native, tmp_path / "native", outliers)
    quantise(Order(folder, tmp_path / "out-f16.gguf", "f16"))
    with pytest.raises(UserError, match=r"the q4_0 model is not its source.*use a type with more bits"):
        quantise(Order(folder, tmp_path / "out.gguf", "q4_0"))
    assert {path.name for path in tmp_path.iterdir()} == {"native", "out-f16.gguf"}


def test_a_merged_lora_is_in_the_file_and_in_its_provenance(lora, sharp, tmp_path):
    _, found = quantise(Order(sharp, tmp_path / "out.gguf", "f16", adapter=lora))
    assert found.divergence < 1e-3  # from base and LoRA beside it
    assert compare(tmp_path / "out.gguf", open_native(sharp)).divergence > 0.1  # from the base alone
    assert provenance(tmp_path / "out.gguf")["adapter"] == lora.name


def written(file):
    """Each matrix of a file in float64, by its name there."""
    tensors = gguf.GGUFReader(file).tensors
    return {one.name: gguf.dequantize(one.data, one.tensor_type).astype(np.float64) for one in tensors}


@pytest.mark.parametrize("type_", WEIGHED)
def test_rows_make_the_error_smaller_that_they_meet(type_, sharp, sample_rows, tmp_path):
    """The squared error of every matrix, each column weighed by what the rows multiply it with."""
    checkpoint = open_native(sharp)
    rows = [checkpoint.tokenizer.encode(row["content"] + row["summary"]) for row in sample_rows[:8]]
    weights = importance(checkpoint, rows)
    for name, given in (("plain", {}), ("weighed", weights)):
        write_gguf(sharp, tmp_path / f"{name}.gguf", type_, Extras(None, given))
    write_gguf(sharp, tmp_path / "whole.gguf", "f16")
    whole, plain, weighed = (written(tmp_path / f"{name}.gguf") for name in ("whole", "plain", "weighed"))
    column_weights = {plan.name: weights.get(plan.entry.native[0]) for plan in plans(checkpoint.shape, type_)}
    met = {name: column for name, column in column_weights.items() if column is not None}
    assert len(met) == 4 * 4 + 1  # qkv, dense, gate and up, down of four layers, and the output layer

    def error(found):
        return sum((((found[name] - whole[name]) ** 2) * met[name]).sum() for name in met)

    assert error(weighed) < 0.98 * error(plain)


def test_rows_stand_in_the_provenance(sharp, sample_rows, tmp_path):
    rows = [Example(Path("mine.jsonl"), 1, 0, row["content"], row["summary"]) for row in sample_rows[:16]]
    quantise(Order(sharp, tmp_path / "weighed.gguf", "q4_k_m", rows=rows, rows_from="mine.jsonl"))
    assert provenance(tmp_path / "weighed.gguf")["imatrix"] == "mine.jsonl"
    assert open_gguf(tmp_path / "weighed.gguf").type == "q4_k_m"


def test_rows_are_refused_where_they_change_nothing(sharp, tmp_path):
    rows = [Example(Path("mine.jsonl"), 1, 0, "问", "答")]
    with pytest.raises(UserError, match=r"--imatrix changes nothing with --type q8_0"):
        quantise(Order(sharp, tmp_path / "out.gguf", "q8_0", rows=rows))


def test_rows_that_do_not_fit_into_memory_are_refused_with_how_many_do(sharp, sample_rows, tmp_path, monkeypatch):
    rows = [Example(Path("mine.jsonl"), 1, 0, row["content"], row["summary"]) for row in sample_rows[:16]]
    checkpoint = open_native(sharp)
    needed = quantising._require_memory(checkpoint)
    encoded = quantising._encoded(rows, checkpoint, None)
    work = max(map(len, encoded)) * 5 * checkpoint.shape.ffn * 4
    ten = needed + work + sum(map(len, encoded[:10])) * checkpoint.shape.hidden * 4
    monkeypatch.setattr(quantising, "importance", None)  # nothing is weighed before it is refused
    for free, remedy in ((ten, "use --imatrix-rows 10"), (needed + 1, "--imatrix-rows 1 is too much")):
        monkeypatch.setattr(quantising, "available_memory", lambda free=free: free)
        with pytest.raises(UserError, match=rf"weighing by 16 rows needs 0\.\d\d GB .*{re.escape(remedy)}"):
            quantise(Order(sharp, tmp_path / "out.gguf", "q4_0", rows=rows))
    assert list(tmp_path.iterdir()) == []


def test_only_one_layer_and_one_state_of_each_row_live(toy_native):
    """All rows' states are what --imatrix-rows asks memory for; two copies would be twice what is counted."""
    checkpoint, seen, live = open_native(toy_native), [], []
    rows = [[300 + number] * 37 for number in range(24)]
    state, matrix = (1, 37, checkpoint.shape.hidden), (checkpoint.shape.hidden, checkpoint.shape.ffn)

    def count():
        shapes = [tuple(one.shape) for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
        return shapes.count(state), shapes.count(matrix)

    def watch(name, _):
        if name.endswith("down_proj.weight"):
            seen.append(name)
            if len(seen) % 24 == 0:  # at a layer's last row most is held
                live.append(count())

    _, others = count()  # of other tests' models
    Layerwise(checkpoint).hidden(rows, watch)
    assert len(live) == 4
    assert max(states for states, _ in live) <= 24 + 6  # and what the row at hand is on its way through the layer
    assert max(matrices for _, matrices in live) == others + 1


@pytest.mark.parametrize("way", ["file", "folder"])
def test_threads_follow_the_share_before_anything_is_computed(way, sharp, tmp_path, monkeypatch):
    from entrypoints.engines import quantised_folder

    def stop(*_):
        seen.append(torch.get_num_threads())
        raise UserError("far enough", "")

    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr(placement, "available_cpus", lambda: 1)
    for module in (quantising, quantised_folder):
        monkeypatch.setattr(module, "open_native", stop)
    torch.set_num_threads(2)
    try:
        with pytest.raises(UserError, match="far enough"):
            if way == "file":
                quantise(Order(sharp, tmp_path / "out.gguf", "q4_0"))
            else:
                quantised_folder.quantise_folder(sharp, tmp_path / "out", "int8")
    finally:
        torch.set_num_threads(before)
    assert seen == [1]
