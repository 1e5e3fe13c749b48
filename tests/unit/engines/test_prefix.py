"""P-Tuning v2 prefixes, and adapters beside each other on one model. Reported pains B6 and C5."""

import json

import pytest
import torch
from transformers import DynamicCache

from entrypoints.checkpoint.adapters import convert_adapter
from entrypoints.engines.transformers_engine import TransformersEngine
from entrypoints.prompt import PromptFormat
from entrypoints.sampling import Sampling

GREEDY = Sampling(temperature=0, max_new_tokens=12)
SHORT, LONG = list(range(300, 305)), list(range(400, 423))  # 5 and 23 ids
LENGTH, VALUES = 6, 4 * 2 * 2 * 32  # of the prefix; layers, keys and values, groups, head


@pytest.fixture(scope="module")
def prefixes(toy_original, toy_native, tmp_path_factory):
    """Three prefixes of the toy, one of them taught another prompt."""
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
    return TransformersEngine.load(toy_native, prefixes[0], device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def serving(toy_native, prefixes):
    """One model, three adapters by name."""
    adapters = {f"{number}": folder for number, folder in enumerate(prefixes)}
    return TransformersEngine.load_for_serving(toy_native, adapters, device="cpu", dtype="float32")


def test_a_prefix_changes_the_answer(prefixed, toy_engine):
    """B6: a prefix that is not applied would be served as the base model."""
    assert list(prefixed.generate(SHORT, GREEDY)) != list(toy_engine.generate(SHORT, GREEDY))


def test_a_prefix_of_length_0_changes_nothing(prefixed, toy_engine):
    model = type(prefixed.model)(prefixed.model.config)
    model.load_state_dict(toy_engine.model.state_dict())
    model.prefix = torch.zeros(8, 2, 0, 32)
    ids = torch.tensor([LONG])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, toy_engine.model(input_ids=ids).logits)


@torch.no_grad()
def test_token_by_token_the_logits_are_those_of_all_at_once(prefixed):
    """The prefix is put in front once, and positions go on from the real tokens."""
    whole = prefixed.model(input_ids=torch.tensor([LONG])).logits[0]
    cache = DynamicCache(config=prefixed.model.config)
    steps = [prefixed.model(input_ids=torch.tensor([[id_]]), cache=cache).logits[0, 0] for id_ in LONG]
    assert cache.get_seq_length() == LENGTH + len(LONG)
    torch.testing.assert_close(torch.stack(steps), whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_first_real_token_stands_at_position_zero(prefixed):
    ids = torch.tensor([SHORT])
    implied = prefixed.model(input_ids=ids).logits
    torch.testing.assert_close(prefixed.model(input_ids=ids, position_ids=torch.arange(5)[None]).logits, implied)
    shifted = prefixed.model(input_ids=ids, position_ids=torch.arange(LENGTH, LENGTH + 5)[None]).logits
    assert (shifted - implied).abs().max() > 1e-3


def test_a_batch_with_a_prefix_gives_the_same_ids_as_one_by_one(prefixed):
    """C5."""
    alone = [list(prefixed.generate(prompt, GREEDY)) for prompt in (SHORT, LONG)]
    assert prefixed.generate_batch([SHORT, LONG], GREEDY) == alone


def test_a_prefix_takes_the_precision_of_the_model(toy_native, prefixes):
    engine = TransformersEngine.load(toy_native, prefixes[0], device="cpu", dtype="bfloat16")
    assert len(list(engine.generate(SHORT, Sampling(temperature=0, max_new_tokens=3)))) == 3


def test_adapters_by_name_answer_as_each_would_alone_and_leave_the_base_as_it_is(
    serving, toy_native, prefixes, toy_engine
):
    answers = []
    for number, folder in enumerate(prefixes):
        alone = TransformersEngine.load(toy_native, folder, device="cpu", dtype="float32")
        answers.append(list(serving.generate(SHORT, GREEDY, adapter=f"{number}")))
        assert answers[-1] == list(alone.generate(SHORT, GREEDY))
    base = list(serving.generate(SHORT, GREEDY))
    assert base == list(toy_engine.generate(SHORT, GREEDY))
    assert len({tuple(ids) for ids in (*answers, base)}) == 4


def test_adapters_share_the_weights_of_the_base(serving):
    """Three adapters on 12 GB must not take 48."""
    base = {name: tensor.data_ptr() for name, tensor in serving.model.named_parameters()}
    assert len(serving._adapted) == 3
    for model in serving._adapted.values():
        assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == base


def test_each_adapter_keeps_the_prompt_it_was_taught(serving):
    """F8."""
    assert [serving.adapters[name].template for name in "012"] == ["chatglm3", "chatglm3", "round"]
    assert serving.prompt_format == PromptFormat()
