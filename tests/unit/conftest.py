"""Loaded toys, made once a session."""

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from entrypoints.checkpoint.native import read_prompt_format
from entrypoints.checkpoint.tokenizer import Tokenizer, load_tokenizer
from entrypoints.engines.transformers_engine import TransformersEngine

Scripted = Callable[..., TransformersEngine]


@pytest.fixture(scope="session")
def toy_tokenizer(toy_native: Path) -> Tokenizer:
    return load_tokenizer(toy_native)


@pytest.fixture(scope="session")
def toy_engine(toy_native: Path) -> TransformersEngine:
    """The untrained toy; float32, so that its numbers are the same on every machine's path."""
    return TransformersEngine.load(toy_native, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def scripted(toy_native: Path, toy_engine: TransformersEngine) -> Scripted:
    """Make an engine whose weights say the given ids after <|assistant|>, whatever was asked; a stop id ends them.

    The layers add nothing, so the hidden state is the last id's embedding, and the output layer points from each id
    of the script to the next: no id may come twice.
    """

    def make(script: Sequence[int], window: int = toy_engine.window) -> TransformersEngine:
        model = copy.deepcopy(toy_engine.model)
        path = [toy_engine.tokenizer.control("<|assistant|>"), *script]
        assert len(set(path)) == len(path), "an id of the script comes twice"
        embedding = torch.nn.functional.normalize(model.get_input_embeddings().weight, dim=-1)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            model.lm_head.weight.zero_()
            for id_, following in itertools.pairwise(path):
                model.lm_head.weight[following] = 5 * embedding[id_]
        return TransformersEngine(model, toy_engine.tokenizer, read_prompt_format(toy_native), window)

    return make
