"""adapter_config.json with fields on which PEFT would act."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import save_file

from entrypoints.checkpoint.adapters import open_adapter
from entrypoints.checkpoint.native import open_native
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.errors import UserError

ENDLESS = r"(.*a){30}b"  # takes longer than the age of the universe on a name with many letters a


@pytest.fixture
def base(toy_native):
    return open_native(toy_native).model_config


@pytest.fixture
def lora(tmp_path, base):
    """A valid native LoRA of q_proj of the first layer."""
    folder = tmp_path / "lora"
    folder.mkdir()
    name, hidden = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight", base.hidden_size
    tensors = {name.format("A"): torch.zeros(2, hidden), name.format("B"): torch.zeros(base.qkv_rows[0], 2)}
    save_file(tensors, folder / "adapter_model.safetensors")

    def write(**changed):
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **changed}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return write


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "down_proj"], ["model.layers.0.self_attn.q_proj"]], ids=str)
def test_a_list_of_known_modules_is_accepted(targets, lora, base):
    assert open_adapter(lora(target_modules=targets), base).pre_seq_len is None


@pytest.mark.parametrize(
    "targets",
    [ENDLESS, "all-linear", "q_proj", [ENDLESS], ["q_proj", "x"], ["q"], [], None, 5, [5], {"q_proj": 1}],
    ids=str,
)
def test_anything_else_as_target_modules_is_rejected(targets, lora, base):
    with pytest.raises(UserError, match=r"adapter_config\.json: target_modules is .*, not a list of module names"):
        open_adapter(lora(target_modules=targets), base)


@pytest.mark.parametrize(
    "changed",
    [
        {"exclude_modules": ENDLESS},
        {"rank_pattern": {ENDLESS: 2}},
        {"layer_replication": [[0, 10**6]]},
        {"megatron_config": {"a": 1}},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"field_of_a_newer_release": [ENDLESS]},
    ],
    ids=str,
)
def test_a_field_on_which_peft_would_act_is_rejected(changed, lora, base):
    with pytest.raises(UserError, match=rf"adapter_config\.json: {next(iter(changed))} "):
        open_adapter(lora(**changed), base)


@pytest.mark.parametrize("field", ["r", "lora_alpha", "lora_dropout"])
@pytest.mark.parametrize("value", [10**9, 1e300, -1, True, math.nan, "2", None], ids=str)
def test_a_number_of_a_wrong_type_or_size_is_named_with_its_range(field, value, lora, base):
    with pytest.raises(UserError, match=rf"adapter_config\.json: {field} is .*, not a.* from "):
        open_adapter(lora(**{field: value}), base)


def test_peft_sees_only_the_fields_that_were_checked(lora, toy_native):
    """Not a path that PEFT would follow, or an initialization."""
    targets = ["model.layers.0.self_attn.q_proj"]
    adapter = lora(
        target_modules=targets,
        base_model_name_or_path="evil/model",
        init_lora_weights="eva",
        field_of_a_newer_release=None,
    )
    engine = TransformersEngine.load(toy_native, EngineOptions(adapter=adapter, device="cpu", dtype="float32"))
    config = engine.model.peft_config["default"]
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (2, 4, set(targets))
    assert config.init_lora_weights is True


def test_a_model_folder_with_an_adapter_inside_is_rejected(toy_native, tmp_path):
    folder = shutil.copytree(toy_native, tmp_path / "native")
    (folder / "adapter_config.json").write_text(json.dumps({"target_modules": ENDLESS}))
    with pytest.raises(UserError, match=r"contains a model and adapter_config\.json"):
        open_native(folder)
