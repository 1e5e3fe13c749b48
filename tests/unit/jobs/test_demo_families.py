"""The demo model of every family: its original layout is recognized, converted and restored."""

import json

import pytest
import torch

from entrypoints.checkpoint.conversion import convert_to_native, convert_to_original, original_format
from entrypoints.checkpoint.native import open_native
from entrypoints.checkpoint.tensor_files import open_weight_files
from entrypoints.demo.model import write_demo_model
from entrypoints.demo.recipe import write_sample_data
from entrypoints.families import FAMILIES


def tensors(folder):
    stored = open_weight_files(folder)
    files = {tensor.file for tensor in stored.tensors.values()}
    return {name: tensor for file in files for name, tensor in stored.load_file(file).items()}


@pytest.mark.parametrize("name", ["ChatGLM3", "ChatGLM2", "CodeGeeX2", "GLM-4"])
def test_the_sample_names_the_model_that_the_demo_imitates(name, tmp_path):
    (family,) = (family for family in FAMILIES.values() if family.title.startswith(f"{name}-"))
    texts = write_sample_data(tmp_path, family)
    assert [text for text in texts if f"，结构和{name}相同，" in text]
    assert name == "ChatGLM3" or "ChatGLM3" not in (tmp_path / "chat.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_demo_of_a_family_is_recognized_converted_and_restored(name, sample_rows, tmp_path):
    assert [*FAMILIES] == ["chatglm3", "chatglm2", "codegeex2", "glm4"]
    texts = [row[column] for row in sample_rows for column in ("content", "summary")]
    write_demo_model(tmp_path / "original", texts, family=FAMILIES[name])
    convert_to_native(tmp_path / "original", tmp_path / "native", original_format(tmp_path / "original"))
    checkpoint = open_native(tmp_path / "native", verify=True)
    assert checkpoint.prompt_format.family == checkpoint.tokenizer.family.name == name
    generation = json.loads((tmp_path / "native" / "generation_config.json").read_text())
    assert (generation["do_sample"], generation["temperature"], generation["top_p"]) == (True, 0.8, 0.8)
    assert generation["eos_token_id"] == list(checkpoint.tokenizer.stop_ids)
    convert_to_original(tmp_path / "native", tmp_path / "back")
    before, after = tensors(tmp_path / "original"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert original_format(tmp_path / "back").family == name
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("original", "back")]
    assert configs[0]["_name_or_path"] == configs[1]["_name_or_path"] == FAMILIES[name].repository
    vocabularies = [(tmp_path / folder / "tokenizer.model").read_bytes() for folder in ("original", "back")]
    assert vocabularies[0] == vocabularies[1]
