"""From a checkpoint of a run to a plain folder; ZeRO shards are in tests/train. Traps A6 and G6."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from entrypoints.__main__ import main
from entrypoints.checkpoint import adapters
from entrypoints.checkpoint.conversion import convert_to_native
from entrypoints.checkpoint.manifest import check_manifest, read_manifest
from entrypoints.checkpoint.native import open_native
from entrypoints.engines import loading
from entrypoints.engines.transformers_engine import TransformersEngine
from entrypoints.errors import UserError
from entrypoints.prompt import PromptFormat
from entrypoints.training.export import export


@pytest.fixture(scope="module")
def lora(tune, tmp_path_factory):
    """One that says other things than its base."""
    fields = {"method": "lora", "lora_target": "all-linear", "learning_rate": 2e-2, "save_steps": 6}
    return tune(tmp_path_factory.mktemp("lora") / "out", prompt_format=PromptFormat(source_prefix="写："), **fields)


@pytest.fixture(scope="module")
def full(tune, tmp_path_factory):
    return tune(tmp_path_factory.mktemp("full") / "out", max_steps=2, save_steps=1)


@torch.inference_mode()
def logits(folder, adapter=None):
    engine = TransformersEngine.load(folder, adapter, device="cpu", dtype="float32")
    return engine.model(input_ids=torch.tensor([[300, 301, 302, 303]])).logits


def test_a_merged_lora_says_what_base_and_lora_say(lora, toy_native, tmp_path, caplog):
    caplog.set_level("INFO")
    export(lora, tmp_path / "merged", toy_native, "float32")
    assert "logits of the merged model" in caplog.text
    apart = (logits(tmp_path / "merged") - logits(toy_native, lora)).abs().max()
    assert apart < 1e-4 < (logits(tmp_path / "merged") - logits(toy_native)).abs().max()
    assert open_native(tmp_path / "merged", verify=True).prompt_format.source_prefix == "写："


def test_a_merged_lora_is_stored_as_its_base_if_nothing_is_said(lora, toy_native, tmp_path):
    export(lora, tmp_path / "merged", toy_native)
    stored, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", toy_native))
    assert {tensor.dtype for tensor in stored.values()} == {tensor.dtype for tensor in base.values()}
    origin = read_manifest(tmp_path / "merged")["provenance"]
    assert (origin["made_by"], origin["method"]) == ("glm export", "lora")


def test_a_merge_that_says_something_else_is_refused_and_leaves_nothing(lora, toy_native, tmp_path, monkeypatch):
    """A wrong scale, as when alpha is taken for the factor."""
    copy = shutil.copytree(lora, tmp_path / "lora")
    with monkeypatch.context() as wrong:
        read = adapters.read_json
        wrong.setattr(adapters, "read_json", lambda file: read(file) | {"lora_alpha": 4000})
        with pytest.raises(UserError, match="off those of base and LoRA"):
            export(copy, tmp_path / "merged", toy_native)
    assert not (tmp_path / "merged").exists()


def test_a_checkpoint_of_float32_becomes_bfloat16_without_the_optimizers_files(full, tmp_path):
    """G6: no 50 GB of float32."""
    checkpoint = full / "checkpoint-1"
    export(checkpoint, tmp_path / "plain")
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "plain"))
    assert {tensor.dtype for tensor in before.values()} == {torch.float32}
    assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in before.items())
    assert not {"optimizer.pt", "rng_state.pth", "checkpoint.json"} & {
        file.name for file in (tmp_path / "plain").iterdir()
    }
    assert check_manifest(tmp_path / "plain", hashes=True) == 8
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_original_layout_comes_back_to_the_same_numbers(full, tmp_path, capsys):
    words = ["export", full, tmp_path / "original", "--to", "original", "--dtype", "float16"]
    assert main([str(word) for word in words]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'original'}\n"
    convert_to_native(tmp_path / "original", tmp_path / "again", PromptFormat())
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", full))
    assert all(torch.equal(ours[name], tensor.half()) for name, tensor in theirs.items())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again", "original"]


def test_an_adapter_is_refused_on_a_base_with_other_weights(lora, full, toy_native, tmp_path):
    """Of the same size, so nothing else would show it; a copy of its own base is its own base."""
    told = r"was tuned on native, whose weights are not those of .*; use the base it was tuned on"
    with pytest.raises(UserError, match=told):
        export(lora, tmp_path / "out", full)
    with pytest.raises(UserError, match=told):
        TransformersEngine.load(full, lora, device="cpu")
    with pytest.raises(UserError, match=told):
        loading.check("transformers", full, {"mine": lora})
    export(lora, tmp_path / "out", shutil.copytree(toy_native, tmp_path / "copy"))


def test_a_prefix_cannot_be_merged_and_a_lora_needs_its_base(lora, tune, toy_native, tmp_path):
    prefix = tune(tmp_path / "prefix", method="ptuning", max_steps=1)
    with pytest.raises(UserError, match="no weights to merge; run it beside its converted base"):
        export(prefix, tmp_path / "out", toy_native)
    with pytest.raises(UserError, match="name the model it was tuned on: --base"):
        export(lora, tmp_path / "out")


def test_a_folder_without_a_model_is_refused(tmp_path, toy_native):
    with pytest.raises(UserError, match="neither model"):
        export(tmp_path, tmp_path / "out", toy_native)
    (tmp_path / "latest").write_text("global_step1")
    with pytest.raises(UserError, match="ZeRO shards alone; name the base"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="do not make a model"):
        export(tmp_path, tmp_path / "out", toy_native)
