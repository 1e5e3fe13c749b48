"""The converted checkpoint and adapters compared with the values of the reference model, in float32 on the CPU."""

import copy
import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.chat_format.sampling import Sampling
from entrypoints.checkpoint.adapters import convert_adapter
from entrypoints.checkpoint.conversion import convert_to_native, convert_to_original
from entrypoints.checkpoint.layout import ROTARY_BUFFER
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine

CASES = ("original-tiny", "original-tiny-lora", "original-tiny-ptuning", "original-tiny-ptuning-mlp")
GREEDY = Sampling(temperature=0, max_new_tokens=24)  # README.md of the golden folder: 24 new ids
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module", params=CASES)
def case(request, golden, golden_native, tmp_path_factory):
    """One checkpoint or adapter, loaded, and the values that the reference computed with it."""
    adapter = None
    if request.param != "original-tiny":
        adapter = tmp_path_factory.mktemp("adapter") / "native"
        convert_adapter(golden / request.param, adapter, golden_native, PromptFormat())
    engine = TransformersEngine.load(golden_native, EngineOptions(adapter=adapter, device="cpu", dtype="float32"))
    return engine, load_file(golden / f"{request.param}.expected.safetensors")


@pytest.fixture(scope="module")
def model(case):
    """The model; a LoRA is merged into the weights, as the reference did."""
    engine, _ = case
    if isinstance(engine.model, peft.PeftModel):
        return copy.deepcopy(engine.model).merge_and_unload()
    return engine.model


@torch.no_grad()
def test_logits_equal_the_reference_for_8_to_400_ids(case, model):
    _, expected = case
    lengths = []
    for name in ("short", "multi", "tools", "long"):
        ids = expected[f"{name}.input_ids"]
        lengths.append(ids.shape[1])
        torch.testing.assert_close(model(input_ids=ids).logits[:, -2:], expected[f"{name}.logits_last2"], **CLOSE)
    assert lengths == [8, 47, 148, 400]


@torch.no_grad()
def test_logits_of_left_padded_rows_equal_the_reference(case, model):
    _, expected = case
    batch = {name: expected[f"batch.{name}"] for name in ("input_ids", "attention_mask", "position_ids")}
    assert batch["attention_mask"].sum(1).tolist() == [4, 10]
    torch.testing.assert_close(model(**batch).logits[:, -1], expected["batch.logits_last"], **CLOSE)


@torch.no_grad()
def test_the_loss_equals_the_reference(case, model):
    _, expected = case
    loss = model(input_ids=expected["long.input_ids"], labels=expected["loss.labels"]).loss
    torch.testing.assert_close(loss[None], expected["loss.value"], **CLOSE)


@pytest.mark.parametrize("case", ["original-tiny-lora"], indirect=True)
@torch.no_grad()
def test_an_unmerged_lora_differs_from_the_reference_only_by_rounding(case):
    """Measured: 1.2e-5 in float32; compared with float64, the reference itself is off by 9.5e-6."""
    engine, expected = case
    for name in ("short", "multi", "tools", "long"):
        found = engine.model(input_ids=expected[f"{name}.input_ids"]).logits[:, -2:]
        torch.testing.assert_close(found, expected[f"{name}.logits_last2"], atol=3e-5, rtol=1e-5)


def until_stop(ids):
    stops = [index for index, id_ in enumerate(ids) if id_ in (2, 64795, 64797)]
    return ids[: stops[0]] if stops else ids


@pytest.mark.parametrize("name", ["short", "multi", "tools"])
def test_streamed_greedy_ids_equal_the_reference(name, case):
    engine, expected = case
    prompt = expected[f"{name}.input_ids"][0].tolist()
    assert list(engine.generate(prompt, GREEDY)) == until_stop(expected[f"{name}.greedy"][0].tolist())


def test_greedy_ids_of_a_padded_batch_equal_the_reference(case):
    engine, expected = case
    names = ("short", "multi", "tools")
    found = engine.generate_batch([expected[f"{name}.input_ids"][0].tolist() for name in names], GREEDY)
    assert found == [until_stop(expected[f"{name}.greedy"][0].tolist()) for name in names]


def test_each_adapter_changes_the_greedy_ids(golden):
    """Otherwise the tests above would pass without the adapter."""
    answers = [load_file(golden / f"{name}.expected.safetensors")["multi.greedy"].tolist() for name in CASES]
    assert all(answers.count(answer) == 1 for answer in answers)


def test_plain_transformers_loads_the_checkpoint_without_remote_code_and_gives_the_same_logits(golden, golden_native):
    model = transformers.AutoModelForCausalLM.from_pretrained(golden_native, local_files_only=True, dtype=torch.float32)
    expected = load_file(golden / "original-tiny.expected.safetensors")
    with torch.no_grad():
        found = model(input_ids=expected["long.input_ids"]).logits[:, -2:]
    torch.testing.assert_close(found, expected["long.logits_last2"], **CLOSE)


def test_the_saved_generation_config_contains_the_three_stop_ids(golden_native):
    """</s>, <|user|> and <|observation|>: ChatGLM3#279."""
    config = json.loads((golden_native / "generation_config.json").read_text())
    assert config["eos_token_id"] == [2, 64795, 64797]


@pytest.fixture(scope="module")
def weights(golden):
    files = sorted((golden / "original-tiny").glob("*.bin"))
    assert len(files) == 2
    return {name: tensor for file in files for name, tensor in torch.load(file).items()}


def assert_same(folder, expected):
    found = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name].dtype != expected[name].dtype] == []
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_the_way_back_gives_every_tensor_of_the_original_files(golden_native, weights, tmp_path):
    """3 layers of 7 tensors, the embedding, the last norm, the output layer and the rotary buffer."""
    convert_to_original(golden_native, tmp_path / "back")
    assert len(weights) == 3 * 7 + 4
    assert_same(tmp_path / "back", weights)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_there_and_back_from_safetensors_is_equal_tensor_for_tensor(dtype, shards, golden, weights, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "tokenizer.model"):
        (source / name).write_bytes((golden / "original-tiny" / name).read_bytes())
    stored = {name: tensor.to(dtype) for name, tensor in weights.items()}
    stored[ROTARY_BUFFER] = 1 / 10000 ** (
        torch.arange(0, 8, 2).to(dtype) / 8
    )  # the buffer as the code makes it in this type
    weight_map = {}
    for number in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensor for index, (name, tensor) in enumerate(stored.items()) if index % shards == number}
        save_file(part, source / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert_to_native(source, tmp_path / "native", PromptFormat())
    convert_to_original(tmp_path / "native", tmp_path / "back")
    assert_same(tmp_path / "back", stored)
