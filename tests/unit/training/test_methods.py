"""What each method trains and saves."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from entrypoints.chat_format.sampling import Sampling
from entrypoints.checkpoint.adapters import open_adapter
from entrypoints.checkpoint.manifest import check_manifest, read_manifest
from entrypoints.checkpoint.native import open_native
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.errors import UserError
from entrypoints.training.arguments import ADAPTER_METHODS, LEARNING_RATES, METHODS, TrainArguments
from entrypoints.training.methods import trainable_model
from entrypoints.training.methods.ptuning import GlmForPrefixTuning

ADAPTERS = [
    ("lora", {}),
    ("lora", {"lora_target": "all-linear", "lora_rank": 4}),
    ("ptuning", {}),
    ("ptuning", {"prefix_projection": True}),
]


def arguments(toy_native, tmp_path, **fields):
    return TrainArguments(toy_native, tmp_path / "rows.jsonl", tmp_path / "out", **fields)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "fields"), ADAPTERS)
def test_an_adapter_is_saved_as_a_folder_that_the_engine_loads(method, fields, tune, toy_native, tmp_path):
    folder = tune(tmp_path / "out", method=method, learning_rate=1e-2, **fields)
    adapter = open_adapter(folder, open_native(toy_native).model_config)
    assert adapter.pre_seq_len == (8 if method == "ptuning" else None)
    assert check_manifest(folder, hashes=True) >= 4
    assert read_manifest(folder)["provenance"]["base_provenance"]["made_by"] == "glm convert"
    base = TransformersEngine.load(toy_native, EngineOptions(device="cpu", dtype="float32"))
    tuned = TransformersEngine.load(toy_native, EngineOptions(adapter=folder, device="cpu", dtype="float32"))
    ids = torch.tensor([[300, 301, 302]])
    with torch.no_grad():
        assert (base.model(input_ids=ids).logits - tuned.model(input_ids=ids).logits).abs().max() > 1e-3
    assert len(tuned.generate_batch([[300, 301]], Sampling(temperature=0, max_new_tokens=3))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "freeze"])
def test_a_complete_model_is_saved_in_the_dtype_of_its_base(method, tune, toy_native, tmp_path):
    tuned, base = open_native(tune(tmp_path / "out", method=method)), open_native(toy_native)
    kinds = {entry.dtype for entry in tuned.files.tensors.values()}
    assert kinds == {entry.dtype for entry in base.files.tensors.values()}
    assert read_manifest(tuned.folder)["provenance"]["method"] == method


def test_freeze_changes_the_last_layers_and_nothing_else(tune, toy_native, tmp_path):
    folder = tune(tmp_path / "out", method="freeze", learning_rate=1e-2)
    before, after = load_file(toy_native / "model.safetensors"), load_file(folder / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition("layers.")[2].partition(".")[0] for name in changed} == {"3"}
    assert len(changed) >= 8


def test_training_more_layers_than_the_model_has_is_rejected(tune, tmp_path):
    with pytest.raises(UserError, match="--freeze-layers 9: the model has 4 layers"):
        tune(tmp_path / "out", method="freeze", freeze_layers=9)


@pytest.mark.parametrize("name", ["original-tiny-ptuning", "original-tiny-ptuning-mlp"])
@torch.no_grad()
def test_a_reference_prefix_in_the_trainers_module_gives_the_reference_logits_and_loss(name, golden, golden_native):
    """Encoder tensors as saved by the public P-Tuning code, with its MLP; dropout is off as in evaluation."""
    expected = load_file(golden / f"{name}.expected.safetensors")
    stored = torch.load(golden / name / "pytorch_model.bin", weights_only=True)
    encoder = {key.removeprefix("transformer.prefix_encoder."): tensor.float() for key, tensor in stored.items()}
    model = AutoModelForCausalLM.from_pretrained(golden_native, dtype=torch.float32)
    model_config = open_native(golden_native).model_config
    length = len(encoder["embedding.weight"])
    learner = GlmForPrefixTuning.wrap(model, model_config, length, "trans.0.weight" in encoder).eval()
    learner.prefix_encoder.load_state_dict(encoder)
    for row in ("short", "multi", "tools", "long"):
        logits = learner(input_ids=expected[f"{row}.input_ids"]).logits[:, -2:]
        torch.testing.assert_close(logits, expected[f"{row}.logits_last2"], atol=1e-5, rtol=1e-5)
    loss = learner(input_ids=expected["long.input_ids"], labels=expected["loss.labels"]).loss
    torch.testing.assert_close(loss[None], expected["loss.value"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("method", "fields"), [*ADAPTERS, ("freeze", {}), ("full", {})])
def test_what_a_method_trains_is_known_before_loading_and_is_in_float32(method, fields, toy_native, tmp_path):
    """With fp16, gradients of 16-bit weights could not be unscaled."""
    run = arguments(toy_native, tmp_path, method=method, pre_seq_len=8, **fields)
    model_config = open_native(toy_native).model_config
    model = trainable_model.load(run, model_config, torch.bfloat16)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in learning} == {torch.float32}
    total = sum(math.prod(size) for entry in open_native(toy_native).files.tensors.values() for size in [entry.shape])
    assert sum(parameter.numel() for parameter in learning) == trainable_model.count_trainable(run, model_config, total)
    frozen = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    assert frozen == (set() if method == "full" else {torch.bfloat16})


def test_every_method_has_a_default_learning_rate_that_the_flag_overrides(toy_native, tmp_path):
    """At the 2e-2 of the public P-Tuning script the model forgets what it could do."""
    assert set(METHODS) == {"full", "freeze", "lora", "qlora", "ptuning"}
    for method in METHODS:
        assert arguments(toy_native, tmp_path, method=method).peak_learning_rate == LEARNING_RATES[method] < 2e-2
        assert arguments(toy_native, tmp_path, method=method, learning_rate=1e-3).peak_learning_rate == 1e-3


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_only_adapters_train_on_quantized_weights(method, toy_native, tmp_path):
    with pytest.raises(UserError, match="int4 weights cannot be trained"):
        arguments(toy_native, tmp_path, method=method, quantization_bit=4)


def test_the_prefix_counts_for_the_context_length(tune, tmp_path):
    """The context length of the tiny model is 1,024."""
    with pytest.raises(UserError, match="context length of the model is 1024, of which the prefix takes 1016"):
        tune(tmp_path / "out", method="ptuning", pre_seq_len=1016)


def test_a_prefix_and_gradient_checkpointing_exclude_each_other(toy_native, tmp_path):
    with pytest.raises(UserError, match="--gradient-checkpointing does not work with ptuning"):
        arguments(toy_native, tmp_path, method="ptuning", gradient_checkpointing=True)


def test_the_prompt_format_is_stored_with_an_adapter(tune, tmp_path):
    folder = tune(tmp_path / "out", method="lora", source_prefix="写广告：")
    assert json.loads((folder / "prompt.json").read_text())["source_prefix"] == "写广告："


def test_adapter_methods_are_methods():
    assert set(ADAPTER_METHODS) < set(METHODS)
