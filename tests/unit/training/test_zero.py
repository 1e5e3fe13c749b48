"""DeepSpeed's configuration agrees with the flags before the model is loaded; whole runs are in tests/train."""

import json
import sys
from pathlib import Path

import pytest
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from entrypoints.errors import UserError
from entrypoints.training import zero
from entrypoints.training.arguments import PRESETS, TrainArguments

BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
ALL_OTHERS = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 16,
    "gradient_accumulation_steps": 7,
    "gradient_clipping": 0.5,
    "optimizer": {"type": "AdamW", "params": {"lr": 1.0, "betas": [0.5, 0.5], "eps": 0.1, "weight_decay": 0.3}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 1.0, "warmup_num_steps": 99, "total_num_steps": 999},
    },
    "zero_optimization": {"stage": 2},
}


def arguments(**fields):
    return TrainArguments(Path("base"), Path("rows"), Path("out"), **fields)


@pytest.fixture
def written(tmp_path):
    """The name of a file with this configuration."""

    def write(**config):
        (tmp_path / "ds.json").write_text(json.dumps(config))
        return str(tmp_path / "ds.json")

    return write


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_leaves_every_number_of_a_batch_to_the_flags(name):
    """G12: DeepSpeed's arithmetic assertion has nothing to find."""
    config = zero.configuration(name)
    assert [config[field] for field in BATCH] == ["auto"] * 3
    assert zero.stage(config) == int(name[4])
    assert zero.offloads(config, "optimizer") == ("offload" in name)
    assert zero.offloads(config, "param") == (name == "zero3-offload")
    assert config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"


def test_a_file_with_other_numbers_is_made_to_agree_and_gathers_what_it_saves(tmp_path, caplog):
    """G5, G12."""
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"train_batch_size": 64, "zero_optimization": {"stage": 3}}))
    config = zero.configuration(str(file))
    assert config["train_batch_size"] == "auto"
    assert "train_batch_size is 64; the flags decide" in caplog.text
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is no JSON"),
        ("[1]", "is no DeepSpeed configuration"),
        ('{"fp16": true}', "no DeepSpeed configuration: fp16 is True"),
        ('{"zero_optimization": {"offload_param": "cpu"}}', "zero_optimization.offload_param is 'cpu'"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(text, told, tmp_path):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError, match=told):
        zero.configuration(str(tmp_path / "ds.json"))


def test_neither_file_nor_preset_is_told_with_the_presets():
    with pytest.raises(UserError, match=r"zero4 is no file and no preset; .*zero3-offload"):
        zero.configuration("zero4")


def test_every_field_that_the_trainer_compares_is_left_to_the_flags(written, tmp_path, monkeypatch, caplog):
    """It would end each process with a ValueError, the model loaded."""
    compared, fill_match = {}, HfTrainerDeepSpeedConfig.fill_match

    def fill(self, field, value, *rest):
        compared[field] = value
        fill_match(self, field, value, *rest)

    monkeypatch.setattr(HfTrainerDeepSpeedConfig, "fill_match", fill)
    config = zero.configuration(written(**ALL_OTHERS), arguments())
    assert "its scheduler decides" in caplog.text
    trainers = HfTrainerDeepSpeedConfig(config)
    settings = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=arguments().rate)
    trainers.trainer_config_process(settings)
    trainers.trainer_config_finalize(settings, None, 10)
    assert trainers.mismatches == []
    assert set(compared) == {*zero.FLAGS, *zero.FIXED, "fp16.enabled", "bf16.enabled"}
    assert {field: compared[field] for field in zero.FIXED} == zero.FIXED
    for field in zero.FLAGS:
        assert f"{field} is " in caplog.text
    assert caplog.text.count("the flags decide") == len(zero.FLAGS)
    assert "gradient_clipping is 0.5; here it is 1.0" in caplog.text


def test_values_that_the_flags_say_too_need_no_warning(written, caplog):
    params = {"lr": 5e-5, "betas": [0.9, 0.999], "weight_decay": 0, "eps": "auto"}
    zero.configuration(written(gradient_clipping=1, optimizer={"type": "AdamW", "params": params}), arguments())
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("section", "flags", "computes", "told"),
    [
        ({"fp16": {"enabled": True}}, {}, None, r"has fp16 on, .* not compute in it; add --fp16, or write"),
        ({"bf16": {"enabled": True}}, {"bf16": False}, None, "has bf16 on, .*; add --bf16"),
        ({"bf16": {"enabled": True}}, {"fp16": True}, None, "has bf16 on, .*; add --bf16"),
        ({"bf16": {"enabled": True}}, {}, {"fp16": False, "bf16": False}, "has bf16 on, .*; add --bf16"),
        ({"fp16": {"enabled": True}}, {}, {"fp16": False, "bf16": True}, "has fp16 on, .*; add --fp16"),
        ({"fp16": {"enabled": False}}, {"fp16": True}, None, "has fp16 off, .* computes in it; leave out --fp16"),
        ({"bf16": {"enabled": False}}, {}, {"fp16": False, "bf16": True}, "has bf16 off, .*; add --no-bf16"),
    ],
)
def test_another_precision_than_the_flags_say_is_refused_with_the_flag(section, flags, computes, told, written):
    with pytest.raises(UserError, match=told):
        zero.configuration(written(**section), arguments(**flags), computes)


@pytest.mark.parametrize(
    ("section", "flags", "computes"),
    [
        ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, {"fp16": True}, {"fp16": True, "bf16": False}),
        ({"bf16": {"enabled": True}}, {}, None),  # the hardware decides, and may have it
        ({"bf16": {"enabled": True}}, {}, {"fp16": False, "bf16": True}),
        ({"bf16": None}, {}, None),
    ],
)
def test_the_precision_that_the_flags_say_is_left_as_it_is(section, flags, computes, written):
    config = zero.configuration(written(**section), arguments(**flags), computes)
    assert {name: config[name] for name in section if name in config} == {k: v for k, v in section.items() if v}


def test_a_precision_without_a_word_on_it_follows_the_flags(written):
    """DeepSpeed would take off for granted, and train in float32."""
    config = zero.configuration(written(fp16={"loss_scale": 0}), arguments(fp16=True))
    assert config["fp16"] == {"loss_scale": 0, "enabled": "auto"}


def test_null_means_that_nothing_is_offloaded(written):
    config = zero.configuration(written(zero_optimization={"stage": 2, "offload_optimizer": None}))
    assert not zero.offloads(config, "optimizer") and not zero.offloads(config, "param")
    config = zero.configuration(written(zero_optimization={"stage": 2, "offload_optimizer": {"device": None}}))
    assert not zero.offloads(config, "optimizer")
    assert zero.stage(zero.configuration(written(zero_optimization=None))) == 0


def test_deepspeed_that_is_not_installed_is_told_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"needs the package deepspeed; pip install 'glm-entrypoints\[deepspeed\]'"):
        zero.configuration("zero2")
    assert zero.configuration(None) is None
