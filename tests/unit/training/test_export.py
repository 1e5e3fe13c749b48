"""Export of a checkpoint as a plain model folder; ZeRO shards are in tests/train."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from entrypoints.__main__ import main
from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.checkpoint import adapters, conversion
from entrypoints.checkpoint.conversion import convert_to_native
from entrypoints.checkpoint.manifest import check_manifest, read_manifest
from entrypoints.checkpoint.native import open_native
from entrypoints.engines import loading
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.errors import UserError
from entrypoints.quantization import layerwise_forward
from entrypoints.training.result.export import ExportOptions, export


@pytest.fixture(scope="module")
def lora(tune, tmp_path_factory):
    """A LoRA whose logits differ from those of its base."""
    fields = {"method": "lora", "lora_target": "all-linear", "learning_rate": 2e-2, "save_steps": 6}
    return tune(tmp_path_factory.mktemp("lora") / "out", source_prefix="写：", **fields)


@pytest.fixture(scope="module")
def full(tune, tmp_path_factory):
    return tune(tmp_path_factory.mktemp("full") / "out", max_steps=2, save_steps=1)


@torch.inference_mode()
def logits(folder, adapter=None):
    engine = TransformersEngine.load(folder, EngineOptions(adapter=adapter, device="cpu", dtype="float32"))
    return engine.model(input_ids=torch.tensor([[300, 301, 302, 303]])).logits


def test_a_merged_lora_has_the_logits_of_base_and_lora(lora, toy_native, tmp_path, caplog):
    caplog.set_level("INFO")
    export(lora, tmp_path / "merged", ExportOptions(toy_native, "float32"))
    assert "logits of the LoRA merged in torch.float32 differ from PEFT's by" in caplog.text
    difference = (logits(tmp_path / "merged") - logits(toy_native, lora)).abs().max()
    assert difference < 1e-4 < (logits(tmp_path / "merged") - logits(toy_native)).abs().max()
    assert open_native(tmp_path / "merged", verify=True).prompt_format.source_prefix == "写："


def test_a_merged_lora_is_stored_in_the_dtype_of_its_base_by_default(lora, toy_native, tmp_path):
    export(lora, tmp_path / "merged", ExportOptions(toy_native))
    stored, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", toy_native))
    assert {tensor.dtype for tensor in stored.values()} == {tensor.dtype for tensor in base.values()}
    provenance = read_manifest(tmp_path / "merged")["provenance"]
    assert (provenance["made_by"], provenance["method"]) == ("glm export", "lora")


def test_a_merge_with_other_logits_is_rejected_before_anything_is_written(lora, toy_native, tmp_path, monkeypatch):
    """A wrong scale, for example alpha in place of alpha / rank."""
    read = adapters.load_lora_factors

    def wrong(*args):
        return {name: factors._replace(scale=100) for name, factors in read(*args).items()}

    monkeypatch.setattr(adapters, "load_lora_factors", wrong)
    monkeypatch.setattr("entrypoints.training.result.export.write_native_folder", None)  # not called
    with pytest.raises(UserError, match=r"merging .* in float32 changes the logits"):
        export(lora, tmp_path / "merged", ExportOptions(toy_native))
    assert not (tmp_path / "merged").exists()


def test_weights_that_change_while_they_are_written_are_detected(lora, toy_native, tmp_path, monkeypatch):
    write = conversion.native.save_tensors

    def flip(weights, file):
        weights = {name: -tensor if name == "model.norm.weight" else tensor for name, tensor in weights.items()}
        write(weights, file)

    monkeypatch.setattr(conversion.native, "save_tensors", flip)
    with pytest.raises(UserError, match="logits of the written model differ from those of its weights"):
        export(lora, tmp_path / "merged", ExportOptions(toy_native))
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["native", "original"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_an_export_needs_is_required_before_anything_slow(
    kind, layout, lora, full, toy_native, tmp_path, monkeypatch
):
    """An existing target, the vocabulary of the original layout, disk, and memory."""
    for name in ("write_native_folder", "require_equal_merge"):
        monkeypatch.setattr(f"entrypoints.training.result.export.{name}", None)  # not called
    base = shutil.copytree(toy_native, tmp_path / "native")
    source = shutil.copytree(lora if kind == "lora" else full, tmp_path / "source")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="already exists; choose another folder, or add --overwrite"):
        export(source, tmp_path / "there", ExportOptions(base), layout)
    size = sum(tensor.nbytes for tensor in load_file(base / "model.safetensors").values())
    written = size * (2 if layout == "original" else 1)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=written - 1))
    with pytest.raises(UserError, match=r"needs .*B, its disk has .* free"):
        export(source, tmp_path / "out", ExportOptions(base), layout)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=written))
    if kind == "lora":
        monkeypatch.setattr(layerwise_forward, "available_memory", lambda: 1000)
        with pytest.raises(UserError, match=r"merging .* needs .*B of memory, .* are available"):
            export(source, tmp_path / "out", ExportOptions(base), layout)
    if layout == "original":
        for folder in (base, source):
            (folder / "tokenizer.model").unlink(missing_ok=True)
            (folder / "manifest.json").unlink()
        with pytest.raises(UserError, match=r"contains no tokenizer\.model; copy it there"):
            export(source, tmp_path / "out", ExportOptions(base), layout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "source", "there"]


def test_a_lora_merged_to_the_original_layout_converts_back_to_the_merged_weights(lora, toy_native, tmp_path):
    export(lora, tmp_path / "merged", ExportOptions(toy_native))
    export(lora, tmp_path / "original", ExportOptions(toy_native), "original")
    convert_to_native(tmp_path / "original", tmp_path / "again", PromptFormat())
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "merged"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_float32_checkpoint_is_exported_as_bfloat16_without_the_files_of_the_optimizer(full, tmp_path):
    """A float32 checkpoint of the 6B with optimizer state takes more than 50 GB."""
    checkpoint = full / "checkpoint-1"
    export(checkpoint, tmp_path / "plain", ExportOptions())
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "plain"))
    assert {tensor.dtype for tensor in before.values()} == {torch.float32}
    assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in before.items())
    assert not {"optimizer.pt", "rng_state.pth", "checkpoint.json"} & {
        file.name for file in (tmp_path / "plain").iterdir()
    }
    assert check_manifest(tmp_path / "plain", hashes=True) == 8
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_export_to_the_original_layout_converts_back_to_the_same_weights(full, tmp_path, capsys):
    command = ["export", full, tmp_path / "original", "--to", "original", "--dtype", "float16"]
    assert main([str(word) for word in command]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'original'}\n"
    convert_to_native(tmp_path / "original", tmp_path / "again", PromptFormat())
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", full))
    assert all(torch.equal(ours[name], tensor.half()) for name, tensor in theirs.items())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again", "original"]


def test_an_adapter_is_rejected_on_a_base_with_other_weights(lora, full, toy_native, tmp_path):
    """The sizes are equal, so only the weights differ; a copy of the right base is accepted."""
    message = r"was tuned on native, whose weights are not those of .*; use the base it was tuned on"
    with pytest.raises(UserError, match=message):
        export(lora, tmp_path / "out", ExportOptions(full))
    with pytest.raises(UserError, match=message):
        TransformersEngine.load(full, EngineOptions(adapter=lora, device="cpu"))
    with pytest.raises(UserError, match=message):
        loading.check_engine_options(full, EngineOptions(adapters={"mine": lora}))
    export(lora, tmp_path / "out", ExportOptions(shutil.copytree(toy_native, tmp_path / "copy")))


@pytest.mark.slow
def test_a_prefix_cannot_be_merged_and_a_lora_needs_its_base(lora, tune, toy_native, tmp_path):
    prefix = tune(tmp_path / "prefix", method="ptuning", max_steps=1)
    with pytest.raises(UserError, match="cannot be merged into weights; load it with its converted base model"):
        export(prefix, tmp_path / "out", ExportOptions(toy_native))
    with pytest.raises(UserError, match="name the model it was trained on: --base"):
        export(lora, tmp_path / "out", ExportOptions())


def test_a_folder_without_a_model_is_rejected(tmp_path, toy_native):
    with pytest.raises(UserError, match="neither model"):
        export(tmp_path, tmp_path / "out", ExportOptions(toy_native))
    (tmp_path / "latest").write_text("global_step1")
    with pytest.raises(UserError, match=r"ZeRO shards without config\.json; name the base"):
        export(tmp_path, tmp_path / "out", ExportOptions())
    with pytest.raises(UserError, match="incomplete or damaged"):
        export(tmp_path, tmp_path / "out", ExportOptions(toy_native))
