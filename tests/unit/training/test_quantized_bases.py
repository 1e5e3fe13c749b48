"""Adapters on a base model in 4 or 8 bits: bitsandbytes on the CPU, which runs the same modules as on CUDA."""

import pytest
import torch
from safetensors.torch import load_file

from entrypoints.checkpoint.native import open_native
from entrypoints.errors import UserError
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.methods import deepspeed_config, precision, trainable_model
from entrypoints.training.preflight import quick_checks

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes (extra qlora)")
RUNS = [
    {"method": "qlora"},
    {"method": "lora", "quantization_bit": 8},
    {"method": "ptuning", "quantization_bit": 4},
    {"method": "ptuning", "quantization_bit": 8},
]


def arguments(base, folder, **fields):
    return TrainArguments(base, folder / "rows", folder / "out", **{"lora_dropout": 0.0, "pre_seq_len": None} | fields)


@pytest.mark.slow
@pytest.mark.parametrize("fields", RUNS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_an_adapter_learns_on_a_quantized_base_and_serves_on_the_plain_one(fields, tune, logged, tmp_path):
    """The result is loaded with the unquantized base model at the end of a run; it learned if its loss fell."""
    output = tune(tmp_path / "out", learning_rate=5e-2, max_steps=6, **fields)
    losses = logged(output)
    assert losses[6] < losses[1] - 0.02, losses
    assert {tensor.dtype for file in output.glob("*.safetensors") for tensor in load_file(file).values()} == {
        torch.float32
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [RUNS[0], RUNS[2]], ids=["qlora", "ptuning"])
def test_loss_and_gradients_are_those_of_the_dequantized_model(fields, dtype, toy_native, tmp_path):
    """A prefix that is cast to the dtype of packed weights, which is uint8, becomes zero and has no gradient."""
    model_config = open_native(toy_native).model_config
    ids = torch.randint(300, 2000, (2, 16), generator=torch.Generator().manual_seed(0))

    def gradients(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            loss = model.eval()(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss, {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}

    found = []
    for dequantized in (False, True):
        torch.manual_seed(0)
        model = trainable_model.load(arguments(toy_native, tmp_path, **fields), model_config, dtype)
        if dequantized:
            packed = [
                (module, name, child)
                for module in model.modules()
                for name, child in module.named_children()
                if type(child) is bitsandbytes.nn.Linear4bit
            ]
            assert len(packed) == 6 * model_config.num_layers
            for module, name, child in packed:
                setattr(module, name, as_linear(child, dtype))
        found.append(gradients(model))
    (loss, grads), (expected, theirs) = found
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 2e-3}
    torch.testing.assert_close(loss, expected, **tolerance)
    assert any(gradient.abs().max() > 1e-4 for gradient in grads.values())
    torch.testing.assert_close(grads, theirs, **tolerance)


def as_linear(packed, dtype):
    """The linear layer whose weights a packed one stands for."""
    weight = bitsandbytes.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state).to(dtype)
    linear = torch.nn.Linear(packed.in_features, packed.out_features, packed.bias is not None, dtype=dtype)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    linear.bias = packed.bias
    return linear


def test_embedding_output_layer_and_norms_of_a_quantized_base_stay_in_the_compute_dtype(toy_native, tmp_path):
    """PEFT's preparation would hold them in float32: 1.1 GB more for the 6B, and hidden states of twice the size."""
    model = trainable_model.load(
        arguments(toy_native, tmp_path, method="qlora"), open_native(toy_native).model_config, torch.bfloat16
    )
    kept = {name: weight.dtype for name, weight in model.named_parameters() if "lora_" not in name}
    assert set(kept.values()) == {torch.uint8, torch.bfloat16}
    assert {kept[f"base_model.model.{name}.weight"] for name in ("model.embed_tokens", "lm_head", "model.norm")} == {
        torch.bfloat16
    }


def test_zero3_is_refused_with_a_quantized_base(toy_native, tmp_path):
    with pytest.raises(UserError, match=r"ZeRO-3 cannot partition a base model in 4 bits; use --deepspeed zero2") as no:
        deepspeed_config.load_config(arguments(toy_native, tmp_path, method="qlora", deepspeed="zero3-offload"))
    assert "--method lora without --quantization-bit" in str(no.value)
    for fields in ({"method": "qlora", "deepspeed": "zero2"}, {"method": "lora", "deepspeed": "zero3"}):
        assert deepspeed_config.load_config(arguments(toy_native, tmp_path, **fields))


def test_a_quantized_base_is_refused_on_apple_gpus(toy_native, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    quantized = arguments(toy_native, tmp_path, method="qlora")
    with pytest.raises(UserError, match=r"bitsandbytes does not support .* on mps; use --device cpu"):
        precision.resolve_precision(quantized)
    assert precision.resolve_precision(arguments(toy_native, tmp_path, method="qlora", device="cpu")).use_cpu


def test_a_missing_bitsandbytes_is_reported_at_once(toy_native, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(UserError, match=r"needs the package bitsandbytes; pip install 'glm-entrypoints\[qlora\]'"):
        quick_checks.check_inputs(arguments(toy_native, tmp_path, method="qlora"))
