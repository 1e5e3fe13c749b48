"""Checkpoints of the related families, converted, compared with the values of their reference code on the CPU."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from entrypoints.checkpoint.conversion import convert_to_native, convert_to_original, original_format
from entrypoints.checkpoint.layout import ROTARY_BUFFER
from entrypoints.checkpoint.tensor_files import open_weight_files
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine

CASES = ("chatglm2-tiny", "chatglm2-32k-tiny", "codegeex2", "glm4-tiny")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module", params=CASES)
def case(request, golden_family, tmp_path_factory):
    """The original folder, the converted one, the model in float32, and the values of the reference."""
    source, target = golden_family / request.param, tmp_path_factory.mktemp("family") / "native"
    name = request.param
    if name == "codegeex2":  # another config.json for the same weights: equal values
        name, source = "chatglm2-tiny", shutil.copytree(golden_family / "chatglm2-tiny", target.parent / "codegeex2")
        (source / "config.json").unlink()
        shutil.copyfile(golden_family / "codegeex2.config.json", source / "config.json")
    convert_to_native(source, target, original_format(source))
    assert original_format(source).family == request.param.split("-")[0]
    engine = TransformersEngine.load(target, EngineOptions(device="cpu", dtype="float32"))
    return source, target, engine, load_file(golden_family / f"{name}.expected.safetensors")


@pytest.mark.slow
@torch.no_grad()
def test_logits_equal_the_reference(case):
    _, _, engine, expected = case
    compared = [name for name in ("short", "multi", "long") if f"{name}.logits_last" in expected]
    assert compared == ["short", "multi", "long"]
    for name in compared:
        found = engine.model(input_ids=expected[f"{name}.input_ids"]).logits[:, -1]
        torch.testing.assert_close(found, expected[f"{name}.logits_last"].view_as(found), **CLOSE)


@torch.no_grad()
def test_logits_of_left_padded_rows_equal_the_reference(case):
    _, _, engine, expected = case
    batch = {name: expected[f"batch.{name}"] for name in ("input_ids", "attention_mask", "position_ids")}
    torch.testing.assert_close(engine.model(**batch).logits[:, -1], expected["batch.logits_last"], **CLOSE)


@torch.no_grad()
def test_the_loss_equals_the_reference(case):
    _, _, engine, expected = case
    loss = engine.model(input_ids=expected["long.input_ids"], labels=expected["loss.labels"]).loss
    torch.testing.assert_close(loss.view_as(expected["loss.value"]), expected["loss.value"], **CLOSE)


def tensors(folder):
    stored = open_weight_files(folder)
    files = {tensor.file for tensor in stored.tensors.values()}
    return {name: tensor for file in files for name, tensor in stored.load_file(file).items()}


@pytest.mark.slow
def test_the_way_back_gives_every_tensor_and_a_folder_of_the_same_family(case, tmp_path):
    source, native, _, _ = case
    convert_to_original(native, tmp_path / "back")
    found, expected = tensors(tmp_path / "back"), tensors(source)
    assert found.keys() == expected.keys()
    assert len(found) == 2 * 7 + 4
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert [name for name in different if name != ROTARY_BUFFER] == []
    assert [name for name in expected if found[name].dtype != expected[name].dtype] == []
    torch.testing.assert_close(found[ROTARY_BUFFER], expected[ROTARY_BUFFER])
    assert original_format(tmp_path / "back") == original_format(source)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
    assert before.get("rope_ratio") == after.get("rope_ratio")


def test_the_rule_of_another_family_would_give_other_logits(golden_family, tmp_path):
    """Why the family must be known: the files of ChatGLM2-6B-32k and ChatGLM3-6B-32k look the same otherwise."""
    source = shutil.copytree(golden_family / "chatglm2-32k-tiny", tmp_path / "chatglm3-32k")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "_name_or_path": "THUDM/chatglm3-6b-32k"}))
    convert_to_native(source, tmp_path / "native", original_format(source))
    engine = TransformersEngine.load(tmp_path / "native", EngineOptions(device="cpu", dtype="float32"))
    expected = load_file(golden_family / "chatglm2-32k-tiny.expected.safetensors")
    with torch.no_grad():
        found = engine.model(input_ids=expected["long.input_ids"]).logits[:, -1]
    assert float((found - expected["long.logits_last"].view_as(found)).abs().max()) > 1
