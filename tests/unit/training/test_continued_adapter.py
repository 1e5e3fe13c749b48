"""--adapter: a LoRA or prefix is continued on its base model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from entrypoints.errors import UserError
from entrypoints.training.methods.continued_adapter import apply_shape

FILES = {"lora": "adapter_model.safetensors", "ptuning": "prefix.safetensors"}


@pytest.fixture(scope="module")
def adapters(tune, tmp_path_factory):
    """A LoRA of rank 4 on all layers and a prefix with an MLP, after three steps each."""
    folder = tmp_path_factory.mktemp("adapters")
    shapes = {
        "lora": {"lora_rank": 4, "lora_alpha": 8, "lora_target": "all-linear"},
        "ptuning": {"prefix_projection": True},
    }
    return {
        method: tune(folder / method, method=method, max_steps=3, save_steps=50, learning_rate=1e-3, **shape)
        for method, shape in shapes.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", FILES)
def test_a_run_starts_from_the_weights_of_the_adapter_and_with_a_new_optimizer(method, adapters, tune, tmp_path):
    """At a vanishing rate the result is the adapter itself."""
    shape, found = apply_shape({"adapter": adapters[method]}, "full")
    fields = {**shape, "method": found, "learning_rate": 1e-12, "max_steps": 1}
    output = tune(tmp_path / "out", **{"lora_dropout": 0.0, **fields})
    ours, theirs = (load_file(folder / FILES[method]) for folder in (output, adapters[method]))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)
    assert max(tensor.abs().max() for name, tensor in ours.items() if "lora_B" in name or name == "prefix") > 1e-4
    state = torch.load(output / "checkpoint-1" / "optimizer.pt", weights_only=True)["state"]
    assert {float(entry["step"]) for entry in state.values()} == {1.0}
    assert json.loads((output / "manifest.json").read_text())["provenance"]["continued"] == adapters[method].name


def test_a_converted_prefix_without_its_encoder_is_continued_from_its_keys_and_values(adapters, tune, tmp_path):
    folder = shutil.copytree(adapters["ptuning"], tmp_path / "converted")
    (folder / "prefix_encoder.safetensors").unlink()
    shape, method = apply_shape({"adapter": folder}, "full")
    assert shape["prefix_projection"] is False
    output = tune(tmp_path / "out", **shape, method=method, learning_rate=1e-12, max_steps=1)
    torch.testing.assert_close(
        load_file(output / "prefix.safetensors")["prefix"], load_file(folder / "prefix.safetensors")["prefix"]
    )


def test_the_shape_of_the_adapter_replaces_defaults_and_a_contradicting_flag_is_named(adapters):
    shape, method = apply_shape({"adapter": adapters["lora"], "lora_rank": 8}, "full")
    assert (method, shape["lora_rank"], shape["lora_alpha"], shape["lora_target"]) == ("lora", 4, 8, "all-linear")
    assert apply_shape({"adapter": adapters["lora"]}, "qlora")[1] == "qlora"
    with pytest.raises(UserError, match="has --lora-rank 4, not 16; omit --lora-rank"):
        apply_shape({"adapter": adapters["lora"], "lora_rank": 16}, "lora")
    with pytest.raises(UserError, match="is for --method ptuning, not lora; omit --method"):
        apply_shape({"adapter": adapters["ptuning"]}, "lora")
    with pytest.raises(UserError, match="has --pre-seq-len 8, not 16; omit --pre-seq-len"):
        apply_shape({"adapter": adapters["ptuning"], "pre_seq_len": 16}, "full")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_rslora": True}, "does not continue a LoRA with use_rslora; merge it into its base model"),
        ({"target_modules": ["q_proj"]}, r"target_modules is \['q_proj'\], which is not one of --lora-target"),
        ({"target_modules": [["q_proj"]]}, r"target_modules is \[\['q_proj'\]\], which is not one of --lora-target"),
        ({"lora_alpha": 1.5}, "not two whole numbers"),
        ({"lora_alpha": float("inf")}, "not two whole numbers"),
        ({"lora_alpha": float("nan")}, "not two whole numbers"),
        ({"r": True}, "not two whole numbers"),
        ({"peft_type": "PREFIX_TUNING"}, "neither LoRA nor P-Tuning v2"),
    ],
)
def test_an_adapter_that_cannot_be_continued_is_refused_by_its_field(changes, message, adapters, tmp_path):
    folder = shutil.copytree(adapters["lora"], tmp_path / "other")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        apply_shape({"adapter": folder}, "full")
    with pytest.raises(UserError, match=r"contains no adapter_config.json"):
        apply_shape({"adapter": tmp_path}, "full")


def test_an_adapter_of_another_base_model_is_refused(adapters, tune, tmp_path):
    other = tune(tmp_path / "other", method="full", max_steps=1)
    shape, method = apply_shape({"adapter": adapters["lora"]}, "full")
    with pytest.raises(UserError, match=r"was tuned on .*, whose weights are not those of"):
        tune(tmp_path / "out", **shape, method=method, model_name_or_path=other)


@pytest.mark.slow
def test_other_rows_continue_with_the_weights_of_a_checkpoint_as_the_error_message_says(tune, sample_file, tmp_path):
    lines = sample_file.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(lines[:10]), encoding="utf-8")
    for method, flag in (("lora", "adapter"), ("full", "model_name_or_path")):
        checkpoint = tune(tmp_path / method, method=method, max_steps=1) / "checkpoint-1"
        with pytest.raises(UserError, match=rf"--{flag.replace('_', '-')} {checkpoint}$"):
            tune(tmp_path / method, method=method, train_file=tmp_path / "other.jsonl", resume="auto")
        tune(
            tmp_path / f"{method}-2",
            method=method,
            max_steps=1,
            train_file=tmp_path / "other.jsonl",
            **{flag: checkpoint},
        )
