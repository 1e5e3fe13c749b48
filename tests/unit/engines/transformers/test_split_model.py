"""A model whose layers are on several devices: the answers are those of the whole model, with and without adapters.

accelerate divides a model by replacing the methods `forward` of its modules. Here layers are offloaded to the disk:
the hooks are those of several GPUs.
"""

import json
from pathlib import Path

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import GlmForCausalLM

from entrypoints.checkpoint.adapter_config import CONFIG_FILE
from entrypoints.checkpoint.adapters import PREFIX_FILE, open_adapter
from entrypoints.checkpoint.native import open_native
from entrypoints.engines.transformers.model import add_adapter, load_model
from entrypoints.hardware.placement import Placement, layer_device_map

IDS = [*range(300, 340)]
PREFIX_LENGTH = 5


@pytest.fixture(scope="module")
def whole(toy_native: Path) -> GlmForCausalLM:
    return load_model(toy_native, Placement({"": "cpu"}, torch.float32), None).eval()


@pytest.fixture(scope="module")
def split(toy_native: Path, tmp_path_factory: pytest.TempPathFactory) -> GlmForCausalLM:
    """By the device map of two GPUs, the second one being the disk."""
    config = open_native(toy_native).model_config
    devices = {"cuda:0": "cpu", "cuda:1": "disk"}
    device_map = {name: devices[device] for name, device in layer_device_map(config, 2).items()}
    assert list(device_map.values()).count("disk") == 3
    model = GlmForCausalLM.from_pretrained(
        toy_native, device_map=device_map, dtype=torch.float32, offload_folder=tmp_path_factory.mktemp("offload")
    ).eval()
    assert model.model.layers[-1].self_attn.k_proj.weight.device.type == "meta"
    return model


@pytest.fixture(scope="module")
def adapters(whole: GlmForCausalLM, toy_native: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    config, generator = whole.config, torch.Generator().manual_seed(3)
    shape = (2 * config.num_hidden_layers, config.num_key_value_heads, PREFIX_LENGTH, config.head_dim)
    (folder / "prefix").mkdir()
    save_file({"prefix": torch.randn(shape, generator=generator)}, folder / "prefix" / PREFIX_FILE)
    prefix = {"adapter_type": "ptuning-v2", "pre_seq_len": PREFIX_LENGTH}
    (folder / "prefix" / CONFIG_FILE).write_text(json.dumps(prefix))
    base = load_model(toy_native, Placement({"": "cpu"}, torch.float32), None)
    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(folder / "lora")
    return {name: folder / name for name in ("prefix", "lora")}


def answer(model: GlmForCausalLM) -> list[int]:
    ids = torch.tensor([IDS])
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0].tolist()


@pytest.fixture(scope="module")
def hooked(toy_native: Path) -> GlmForCausalLM:
    """All weights in memory, with the hooks of several devices: PEFT places no LoRA beside offloaded weights."""
    model = load_model(toy_native, Placement({"": "cpu"}, torch.float32), None).eval()
    names = layer_device_map(open_native(toy_native).model_config, 2)
    return accelerate.dispatch_model(model, dict.fromkeys(names, "cpu"), force_hooks=True)


@pytest.mark.parametrize(
    ("kind", "placement"),
    [(None, "split"), ("prefix", "split"), (None, "hooked"), ("prefix", "hooked"), ("lora", "hooked")],
)
@torch.no_grad()
def test_a_split_model_answers_as_the_whole_one(kind, placement, whole, adapters, toy_native, request):
    base, divided = answer(whole), request.getfixturevalue(placement)
    if kind:
        adapter = open_adapter(adapters[kind], open_native(toy_native).model_config)
        whole, divided = (add_adapter(model, adapter).eval() for model in (whole, divided))
    assert answer(divided) == answer(whole)
    assert (answer(divided) == base) is (kind is None), "the adapter changes the answer"
    ids = torch.tensor([IDS])
    torch.testing.assert_close(divided(input_ids=ids).logits, whole(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
