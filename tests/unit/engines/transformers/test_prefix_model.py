"""P-Tuning v2 prefixes, and several adapters on one model."""

import json

import pytest
import torch
from transformers import DynamicCache

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.chat_format.sampling import Sampling
from entrypoints.checkpoint.adapters import convert_adapter
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.engines.transformers.prefix_model import CACHE

GREEDY = Sampling(temperature=0, max_new_tokens=12)
SHORT, LONG = list(range(300, 305)), list(range(400, 423))  # 5 and 23 ids
LENGTH, VALUES = 6, 4 * 2 * 2 * 32  # of the prefix; layers, keys and values, groups, head


@pytest.fixture(scope="module")
def prefixes(toy_original, toy_native, tmp_path_factory):
    """Three prefixes of the tiny model, one of them trained with another prompt format."""
    folder = tmp_path_factory.mktemp("prefixes")
    config = json.loads((toy_original / "config.json").read_text()) | {"pre_seq_len": LENGTH}
    for number, template in enumerate(("chatglm3", "chatglm3", "round")):
        source = folder / f"source-{number}"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(config))
        values = torch.randn(LENGTH, VALUES, generator=torch.Generator().manual_seed(number))
        torch.save({"transformer.prefix_encoder.embedding.weight": values}, source / "pytorch_model.bin")
        convert_adapter(source, folder / f"{number}", toy_native, PromptFormat(template))
    return [folder / f"{number}" for number in range(3)]


@pytest.fixture(scope="module")
def prefixed(toy_native, prefixes):
    return TransformersEngine.load(toy_native, EngineOptions(adapter=prefixes[0], device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def serving(toy_native, prefixes):
    """One model, three adapters by name."""
    adapters = {f"{number}": folder for number, folder in enumerate(prefixes)}
    return TransformersEngine.load(toy_native, EngineOptions(adapters=adapters, device="cpu", dtype="float32"))


def test_a_prefix_changes_the_answer(prefixed, toy_engine):
    """A prefix that is not applied would silently serve the base model."""
    assert list(prefixed.generate(SHORT, GREEDY)) != list(toy_engine.generate(SHORT, GREEDY))


def test_a_prefix_of_length_0_changes_nothing(prefixed, toy_engine):
    model = type(prefixed.model)(prefixed.model.config)
    model.load_state_dict(toy_engine.model.state_dict())
    model.prefix = torch.zeros(8, 2, 0, 32)
    ids = torch.tensor([LONG])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, toy_engine.model(input_ids=ids).logits)


@torch.no_grad()
def test_logits_token_by_token_equal_those_of_one_pass(prefixed):
    """The prefix is prepended once, and positions count only the tokens of the prompt."""
    whole = prefixed.model(input_ids=torch.tensor([LONG])).logits[0]
    cache = DynamicCache(config=prefixed.model.config)
    steps = [prefixed.model(input_ids=torch.tensor([[id_]]), **{CACHE: cache}).logits[0, 0] for id_ in LONG]
    assert cache.get_seq_length() == LENGTH + len(LONG)
    torch.testing.assert_close(torch.stack(steps), whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_first_token_of_the_prompt_has_position_zero(prefixed):
    ids = torch.tensor([SHORT])
    implied = prefixed.model(input_ids=ids).logits
    torch.testing.assert_close(prefixed.model(input_ids=ids, position_ids=torch.arange(5)[None]).logits, implied)
    shifted = prefixed.model(input_ids=ids, position_ids=torch.arange(LENGTH, LENGTH + 5)[None]).logits
    assert (shifted - implied).abs().max() > 1e-3


def test_a_batch_with_a_prefix_gives_the_same_ids_as_one_by_one(prefixed):
    """Padding stands between the prefix and a shorter prompt, and must be masked."""
    alone = [list(prefixed.generate(prompt, GREEDY)) for prompt in (SHORT, LONG)]
    assert prefixed.generate_batch([SHORT, LONG], GREEDY) == alone


def test_a_prefix_is_cast_to_the_dtype_of_the_model(toy_native, prefixes):
    engine = TransformersEngine.load(toy_native, EngineOptions(adapter=prefixes[0], device="cpu", dtype="bfloat16"))
    assert len(list(engine.generate(SHORT, Sampling(temperature=0, max_new_tokens=3)))) == 3


def test_adapters_by_name_answer_as_each_does_alone_and_leave_the_base_model_unchanged(
    serving, toy_native, prefixes, toy_engine
):
    answers = []
    for number, folder in enumerate(prefixes):
        alone = TransformersEngine.load(toy_native, EngineOptions(adapter=folder, device="cpu", dtype="float32"))
        answers.append(list(serving.generate(SHORT, GREEDY, adapter=f"{number}")))
        assert answers[-1] == list(alone.generate(SHORT, GREEDY))
    base = list(serving.generate(SHORT, GREEDY))
    assert base == list(toy_engine.generate(SHORT, GREEDY))
    assert len({tuple(ids) for ids in (*answers, base)}) == 4


def test_adapters_share_the_weights_of_the_base(serving):
    """Three adapters on a model of 12 GB must not take 48 GB."""
    base = {name: tensor.data_ptr() for name, tensor in serving.model.named_parameters()}
    assert len(serving._adapted_models) == 3
    for model in serving._adapted_models.values():
        assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == base


def test_each_adapter_keeps_the_prompt_format_it_was_trained_with(serving):
    """Another format than in training lowers the quality without an error."""
    assert [serving.adapters[name].template for name in "012"] == ["chatglm3", "chatglm3", "round"]
    assert serving.prompt_format == PromptFormat()
