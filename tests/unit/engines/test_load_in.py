"""`--load-in`: what is refused before anything is loaded, and on a GPU what it gives."""

import importlib.util

import pytest
import torch

from entrypoints.engines import placement
from entrypoints.engines.loading import PACKAGES, check
from entrypoints.engines.transformers_engine import TransformersEngine
from entrypoints.errors import UserError
from entrypoints.sampling import Sampling


@pytest.fixture
def bitsandbytes(monkeypatch):
    """Say that the package is there, or that it is not."""
    find = importlib.util.find_spec

    def pretend(there):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: there or None if name == "bitsandbytes" else find(name)
        )

    return pretend


@pytest.mark.parametrize(
    ("engine", "adapters", "there", "words"),
    [
        ("llamacpp", {}, True, "--load-in is not for the engine llamacpp; a GGUF file has its own precision"),
        ("vllm", {}, True, "vLLM makes 8 bits of a folder, and not 4; --load-in 8bit"),
        ("transformers", {"mine": "x"}, True, "--load-in takes no --adapter; merge a LoRA first"),
        ("transformers", {}, False, "--load-in needs the package bitsandbytes"),
    ],
)
def test_what_cannot_be_loaded_in_fewer_bits_is_refused(
    engine, adapters, there, words, bitsandbytes, toy_native, toy_gguf, monkeypatch
):
    bitsandbytes(there)
    monkeypatch.setitem(PACKAGES, "vllm", "json")  # whether it is installed or not
    with pytest.raises(UserError, match=words):
        check(engine, toy_gguf if engine == "llamacpp" else toy_native, adapters, "4bit")


def test_more_memory_than_there_is_is_refused_before_loading(bitsandbytes, toy_native, monkeypatch):
    bitsandbytes(True)
    monkeypatch.setattr(placement, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"the model needs 0\.0 GB of memory"):
        check("transformers", toy_native, {}, "8bit", "cpu")


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_a_processor_computes_in_fewer_bits_too(load_in, toy_native):
    pytest.importorskip("bitsandbytes")
    engine = TransformersEngine.load(toy_native, device="cpu", load_in=load_in)
    assert (
        type(engine.model.model.layers[0].mlp.down_proj).__name__
        == {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[load_in]
    )
    assert len(list(engine.generate([300, 301], Sampling(max_new_tokens=4, temperature=0)))) <= 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_a_model_loaded_in_fewer_bits_answers_in_less_memory(load_in, toy_native):
    pytest.importorskip("bitsandbytes")
    sizes = []
    for bits in (None, load_in):
        before = torch.cuda.memory_allocated()
        engine = TransformersEngine.load(toy_native, device="cuda", load_in=bits)
        sizes.append(torch.cuda.memory_allocated() - before)
        assert len(list(engine.generate([300, 301], Sampling(max_new_tokens=4, temperature=0)))) <= 4
        del engine
    assert sizes[1] < sizes[0]
