"""`--load-in`: what is rejected before loading, and the quantized model."""

import importlib.util
from pathlib import Path

import pytest
import torch

from entrypoints.chat_format.sampling import Sampling
from entrypoints.engines.loading import ENGINE_PACKAGES, check_engine_options
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.errors import UserError
from entrypoints.hardware import placement


@pytest.fixture
def bitsandbytes(monkeypatch):
    """Makes the package look installed or missing."""
    find = importlib.util.find_spec

    def pretend(installed):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: installed or None if name == "bitsandbytes" else find(name)
        )

    return pretend


@pytest.mark.parametrize(
    ("engine", "adapters", "installed", "message"),
    [
        ("llamacpp", {}, True, "--load-in is not supported by the engine llamacpp; omit it"),
        ("vllm", {}, True, "--load-in 4bit is not supported by the engine vllm; --load-in 8bit"),
        ("transformers", {"mine": Path("x")}, True, "--load-in does not support --adapter; merge a LoRA first"),
        ("transformers", {}, False, "--load-in needs the package bitsandbytes"),
    ],
)
def test_unsupported_combinations_are_rejected(
    engine, adapters, installed, message, bitsandbytes, toy_native, toy_gguf, monkeypatch
):
    bitsandbytes(installed)
    monkeypatch.setitem(ENGINE_PACKAGES, "vllm", "json")  # installed or not
    model = toy_gguf if engine == "llamacpp" else toy_native
    with pytest.raises(UserError, match=message):
        check_engine_options(model, EngineOptions(engine=engine, adapters=adapters, load_in="4bit"))


def test_insufficient_memory_is_reported_before_loading(bitsandbytes, toy_native, monkeypatch):
    bitsandbytes(True)
    monkeypatch.setattr(placement, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"the model needs \S+ [kM]B of memory"):
        check_engine_options(toy_native, EngineOptions(load_in="8bit", device="cpu"))


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_a_quantized_model_runs_on_the_cpu(load_in, toy_native):
    pytest.importorskip("bitsandbytes")
    engine = TransformersEngine.load(toy_native, EngineOptions(device="cpu", load_in=load_in))
    assert (
        type(engine.model.model.layers[0].mlp.down_proj).__name__
        == {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[load_in]
    )
    assert len(list(engine.generate([300, 301], Sampling(max_new_tokens=4, temperature=0)))) <= 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_a_quantized_model_uses_less_gpu_memory(load_in, toy_native):
    pytest.importorskip("bitsandbytes")
    sizes = []
    for bits in (None, load_in):
        before = torch.cuda.memory_allocated()
        engine = TransformersEngine.load(toy_native, EngineOptions(device="cuda", load_in=bits))
        sizes.append(torch.cuda.memory_allocated() - before)
        assert len(list(engine.generate([300, 301], Sampling(max_new_tokens=4, temperature=0)))) <= 4
        del engine
    assert sizes[1] < sizes[0]
