"""A context length that is shorter than the model's, on each engine."""

from pathlib import Path

import pytest

from entrypoints.chat_format.sampling import Sampling
from entrypoints.checkpoint.native import open_native
from entrypoints.engines.loading import check_engine_options
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.engines.vllm.engine_args import model_settings
from entrypoints.errors import UserError

GREEDY = Sampling(max_new_tokens=50, temperature=0)


@pytest.mark.parametrize("length", [1025, 1, 0, -5])
def test_a_context_length_that_the_model_does_not_support_is_rejected_before_loading(toy_native, toy_gguf, length):
    for model in (toy_native, toy_gguf):
        with pytest.raises(
            UserError, match=f"--context-length {length}: the model has a context length of 1024; .* 2 to"
        ):
            check_engine_options(model, EngineOptions(context_length=length))
    check_engine_options(toy_gguf, EngineOptions(context_length=2))


@pytest.mark.parametrize("slots", [1, 2])
def test_transformers_ends_an_answer_at_the_shorter_context_and_rejects_longer_prompts(toy_native: Path, slots):
    options = EngineOptions(device="cpu", dtype="float32", slots=slots, context_length=100)
    engine = TransformersEngine.load(toy_native, options)
    assert engine.context_length == 100
    assert len(list(engine.generate([100] * 90, GREEDY))) == 10
    with pytest.raises(UserError, match="the prompt has 100 tokens, the context length is 100"):
        next(engine.generate([100] * 100, GREEDY))
    engine.close()


def test_vllm_is_started_with_the_shorter_context(toy_native: Path):
    options = EngineOptions(engine="vllm", context_length=100)
    assert model_settings(options.limited(open_native(toy_native)), options)["max_model_len"] == 100


def test_no_slot_is_rejected():
    with pytest.raises(UserError, match="--slots 0 is below 1"):
        EngineOptions(slots=0)
