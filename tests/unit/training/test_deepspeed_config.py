"""The DeepSpeed configuration is consistent with the flags before the model is loaded; whole runs: tests/train."""

import json
import sys
from pathlib import Path

import pytest
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from entrypoints.errors import UserError
from entrypoints.training.arguments import PRESETS, TrainArguments
from entrypoints.training.methods import deepspeed_config

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


def checked(file, flags=None, computes=None):
    """The configuration of a run with these flags; `computes`: the precision that the hardware supports."""
    run = arguments(deepspeed=file, **(flags or {}))
    config = deepspeed_config.load_config(run)
    if computes:
        deepspeed_config.check_precision(file, config, computes)
    return config


@pytest.fixture
def written(tmp_path):
    """Write this configuration to a file and return its name."""

    def write(**config):
        (tmp_path / "ds.json").write_text(json.dumps(config))
        return str(tmp_path / "ds.json")

    return write


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_leaves_every_batch_size_to_the_flags(name):
    """DeepSpeed asserts that the three batch sizes are consistent."""
    config = deepspeed_config.load_config(arguments(deepspeed=name))
    assert [config[field] for field in BATCH] == ["auto"] * 3
    assert deepspeed_config.zero_stage(config) == int(name[4])
    assert deepspeed_config.is_offloaded(config, "optimizer") == ("offload" in name)
    assert deepspeed_config.is_offloaded(config, "param") == (name == "zero3-offload")
    assert config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"


def test_a_file_with_other_batch_sizes_is_adapted_to_the_flags_and_gathers_the_weights_it_saves(tmp_path, caplog):
    """Otherwise the Trainer fails on the difference, and ZeRO-3 saves empty tensors."""
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"train_batch_size": 64, "zero_optimization": {"stage": 3}}))
    config = deepspeed_config.load_config(arguments(deepspeed=str(file)))
    assert config["train_batch_size"] == "auto"
    assert "train_batch_size is 64; the flags determine it" in caplog.text
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "is not a DeepSpeed configuration"),
        ('{"fp16": true}', "not a DeepSpeed configuration: fp16 is True"),
        ('{"zero_optimization": {"offload_param": "cpu"}}', "zero_optimization.offload_param is 'cpu'"),
    ],
)
def test_a_file_that_is_not_a_configuration_is_named(text, message, tmp_path):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError, match=message):
        deepspeed_config.load_config(arguments(deepspeed=str(tmp_path / "ds.json")))


@pytest.mark.parametrize("encoding", ["utf-16", "gb18030"])
def test_a_file_in_another_encoding_is_named_and_a_byte_order_mark_is_accepted(encoding, tmp_path):
    text = json.dumps({"comment": "两张卡", "zero_optimization": {"stage": 2}}, ensure_ascii=False)
    file = tmp_path / "ds.json"
    file.write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match=r"ds.json is not valid JSON \(.*decode.*; fix it and save it as UTF-8, or use"):
        deepspeed_config.read_config(str(file))
    file.write_bytes(text.encode("utf-8-sig"))
    assert deepspeed_config.zero_stage(deepspeed_config.read_config(str(file))) == 2


def test_the_error_for_an_unknown_preset_lists_the_presets():
    with pytest.raises(UserError, match=r"zero4 is neither a file nor a preset; .*zero3-offload"):
        deepspeed_config.load_config(arguments(deepspeed="zero4"))


def test_every_field_that_the_trainer_compares_is_left_to_the_flags(written, tmp_path, monkeypatch, caplog):
    """Each process would fail with a ValueError after the model is loaded."""
    compared, fill_match = {}, HfTrainerDeepSpeedConfig.fill_match

    def fill(self, field, value, *rest):
        compared[field] = value
        fill_match(self, field, value, *rest)

    monkeypatch.setattr(HfTrainerDeepSpeedConfig, "fill_match", fill)
    config = deepspeed_config.load_config(arguments(deepspeed=written(**ALL_OTHERS)))
    assert "its scheduler determines" in caplog.text
    trainers = HfTrainerDeepSpeedConfig(config)
    settings = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=arguments().peak_learning_rate)
    trainers.trainer_config_process(settings)
    trainers.trainer_config_finalize(settings, None, 10)
    assert trainers.mismatches == []
    assert set(compared) == {*deepspeed_config.FLAGS, *deepspeed_config.FIXED, "fp16.enabled", "bf16.enabled"}
    assert {field: compared[field] for field in deepspeed_config.FIXED} == deepspeed_config.FIXED
    for field in deepspeed_config.FLAGS:
        assert f"{field} is " in caplog.text
    assert caplog.text.count("the flags determine it") == len(deepspeed_config.FLAGS)
    assert "gradient_clipping is 0.5; 1.0 is used" in caplog.text


def test_values_equal_to_those_of_the_flags_cause_no_warning(written, caplog):
    params = {"lr": 5e-5, "betas": [0.9, 0.999], "weight_decay": 0, "eps": "auto"}
    file = written(gradient_clipping=1, optimizer={"type": "AdamW", "params": params})
    deepspeed_config.load_config(arguments(deepspeed=file))
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("section", "flags", "computes", "message"),
    [
        ({"fp16": {"enabled": True}}, {}, None, r"enables fp16, .* not use it; add --fp16, or set"),
        ({"bf16": {"enabled": True}}, {"bf16": False}, None, "enables bf16, .*; add --bf16"),
        ({"bf16": {"enabled": True}}, {"fp16": True}, None, "enables bf16, .*; add --bf16"),
        ({"bf16": {"enabled": True}}, {}, {"fp16": False, "bf16": False}, "enables bf16, .*; add --bf16"),
        ({"fp16": {"enabled": True}}, {}, {"fp16": False, "bf16": True}, "enables fp16, .*; add --fp16"),
        ({"fp16": {"enabled": False}}, {"fp16": True}, None, "disables fp16, .* run uses it; omit --fp16"),
        ({"bf16": {"enabled": False}}, {}, {"fp16": False, "bf16": True}, "disables bf16, .*; add --no-bf16"),
    ],
)
def test_a_file_with_another_precision_than_the_run_is_rejected_with_the_flag_to_change(
    section, flags, computes, message, written
):
    with pytest.raises(UserError, match=message):
        checked(written(**section), flags, computes)


@pytest.mark.parametrize(
    ("section", "flags", "computes"),
    [
        ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, {"fp16": True}, {"fp16": True, "bf16": False}),
        ({"bf16": {"enabled": True}}, {}, None),  # the hardware decides, and may have it
        ({"bf16": {"enabled": True}}, {}, {"fp16": False, "bf16": True}),
        ({"bf16": None}, {}, None),
    ],
)
def test_the_precision_of_the_run_stays_as_it_is_in_the_file(section, flags, computes, written):
    config = checked(written(**section), flags, computes)
    assert {name: config[name] for name in section if name in config} == {k: v for k, v in section.items() if v}


def test_a_precision_section_without_enabled_follows_the_flags(written):
    """DeepSpeed takes a missing value for false and would train in float32."""
    config = checked(written(fp16={"loss_scale": 0}), {"fp16": True}, None)
    assert config["fp16"] == {"loss_scale": 0, "enabled": "auto"}


def test_null_means_that_nothing_is_offloaded(written):
    config = checked(written(zero_optimization={"stage": 2, "offload_optimizer": None}))
    assert not deepspeed_config.is_offloaded(config, "optimizer")
    assert not deepspeed_config.is_offloaded(config, "param")
    config = checked(written(zero_optimization={"stage": 2, "offload_optimizer": {"device": None}}))
    assert not deepspeed_config.is_offloaded(config, "optimizer")
    assert deepspeed_config.zero_stage(checked(written(zero_optimization=None))) == 0


def test_the_error_for_a_missing_deepspeed_package_names_the_package_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"needs the package deepspeed; pip install 'glm-entrypoints\[deepspeed\]'"):
        deepspeed_config.load_config(arguments(deepspeed="zero2"))
    assert deepspeed_config.load_config(arguments()) is None
