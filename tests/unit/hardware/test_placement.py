"""Device and precision of a model, on one device and on several."""

import itertools

import accelerate
import peft
import pytest
import torch
import transformers

from entrypoints.chat_format.sampling import Sampling
from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.checkpoint.native import open_native
from entrypoints.demo.model import MODEL_CONFIG
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers import engine
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.engines.transformers.prefix_model import PrefixedGlm
from entrypoints.errors import UserError
from entrypoints.hardware import placement, resources
from entrypoints.hardware.placement import (
    Placement,
    choose_placement,
    layer_device_map,
    required_gpu_count,
    weight_bytes,
)

# config.json of chatglm3-6b
CHATGLM3_6B = ModelConfig(28, 4096, 32, 2, 128, 13696, 65024, 8192, 1e-5, 1)
GB = 10**9


@pytest.fixture
def gpus(monkeypatch):
    """Simulate CUDA devices with the given free bytes, with or without bfloat16."""

    def simulate(*free, bf16=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(free))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free[gpu], 80 * GB))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: "simulated")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (8, 0) if bf16 else (7, 5))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    return simulate


def test_chatglm3_6b_has_the_published_number_of_parameters():
    """6,243,584,000: transformers' count for THUDM/chatglm3-6b; 12.49 GB in 16 bits."""
    assert weight_bytes(CHATGLM3_6B, 1) == 6_243_584_000


def test_the_weight_bytes_of_the_tiny_model_equal_those_of_its_files(toy_native):
    assert weight_bytes(MODEL_CONFIG, 2) == open_native(toy_native).files.nbytes


def meta_model(kind, model_config):
    """A model of that configuration on the meta device: plain, with a LoRA, or with a prefix."""
    config = transformers.GlmConfig(**model_config.native_config("float32", (2,), 0))
    with torch.device("meta"):
        model = (PrefixedGlm if kind == "prefix" else transformers.GlmForCausalLM)(config)
        if kind == "lora":
            targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
            model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets))
    return model


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["plain", "lora", "prefix"])
@pytest.mark.parametrize("model_config", [MODEL_CONFIG, CHATGLM3_6B], ids=["tiny", "6b"])
def test_every_parameter_has_a_device_and_layers_are_in_order(count, kind, model_config):
    """The module names come from the model, including one that PEFT wraps."""
    device_map = layer_device_map(model_config, count)
    inner = "base_model.model." if kind == "lora" else ""
    devices = {}
    for name, _ in itertools.chain(
        *((lambda m: (m.named_parameters(), m.named_buffers()))(meta_model(kind, model_config)))
    ):
        found = [module for module in device_map if f"{name}.".startswith(f"{inner}{module}.")]
        assert len(found) == 1, name
        devices.setdefault(found[0], device_map[found[0]])
    assert devices.keys() == device_map.keys()
    layers = [
        int(device_map[f"model.layers.{number}"].removeprefix("cuda:")) for number in range(model_config.num_layers)
    ]
    assert layers == sorted(layers)
    assert set(layers) | {0} == set(range(count))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_embedding_norm_and_output_layer_share_the_first_device(count):
    """They are used together, so their tensors must be on one device."""
    device_map = layer_device_map(CHATGLM3_6B, count)
    ends = [device_map[name] for name in ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")]
    assert ends == ["cuda:0"] * 4


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["plain", "prefix"])
def test_accelerate_accepts_the_device_map(count, kind):
    """It raises "does not give any device for ..." for a module without one."""
    accelerate.utils.check_device_map(meta_model(kind, MODEL_CONFIG), layer_device_map(MODEL_CONFIG, count))


@pytest.mark.parametrize(
    ("needed", "free", "count"),
    [
        (10, [12], 1),
        (10, [12, 12], 1),
        (20, [12, 12], 2),
        (30, [12, 12, 12], 3),
        (20, [12, 9, 12], 3),
        (24, [12, 12], 2),
    ],
)
def test_the_smallest_number_of_gpus_that_holds_the_model_is_used(needed, free, count):
    """Each takes an equal share, so the one with the least free memory decides."""
    assert required_gpu_count(needed, free) == count


def test_gpus_that_are_too_small_together_are_rejected_with_all_sizes():
    with pytest.raises(UserError, match=r"needs 13\.7 GB, the GPUs have 6\.0 GB, 5\.0 GB free"):
        required_gpu_count(13_700_000_000, [6 * GB, 5 * GB])


@pytest.mark.parametrize(
    ("bf16", "dtype", "expected"),
    [
        (True, "auto", torch.bfloat16),
        (False, "auto", torch.float16),
        (False, "bfloat16", torch.bfloat16),
        (True, "float32", torch.float32),
    ],
)
def test_a_gpu_computes_in_bfloat16_if_it_can_and_in_float16_otherwise(bf16, dtype, expected, gpus):
    """V100 and T4 have no bfloat16. A named precision is always used."""
    gpus(80 * GB, bf16=bf16)
    chosen = choose_placement(CHATGLM3_6B, "auto", dtype)
    assert (chosen.dtype, set(chosen.device_map.values())) == (expected, {"cuda:0"})


def test_two_gpus_are_used_when_one_is_too_small(gpus):
    gpus(10 * GB, 10 * GB)
    assert sorted(set(choose_placement(CHATGLM3_6B).device_map.values())) == ["cuda:0", "cuda:1"]


def test_an_apple_gpu_computes_in_float16(monkeypatch, gpus):
    gpus()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_placement(MODEL_CONFIG) == Placement({"": "mps"}, torch.float16)


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_computes_in_bfloat16_only_if_it_does_so_in_hardware(native, expected, gpus, monkeypatch):
    """Never in float16, for which some operations are missing."""
    gpus()
    monkeypatch.setattr(placement, "cpu_has_native_bf16", lambda: native)
    assert choose_placement(MODEL_CONFIG) == Placement({"": "cpu"}, expected)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags : fpu avx2 avx512f", False),
        ("flags : fpu avx512_bf16", True),
        ("Features : fp asimd bf16 i8mm", True),
        ("", False),
    ],
)
def test_the_cpu_flags_show_whether_it_has_bfloat16(flags, expected, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    monkeypatch.setattr(resources, "CPUINFO_FILE", tmp_path / "cpuinfo")
    assert placement.cpu_has_native_bf16() is expected


def test_torch_uses_as_many_threads_as_the_quota_allows(monkeypatch):
    """And never more than OMP_NUM_THREADS."""
    before = torch.get_num_threads()
    try:
        for requested, allowed, expected in ((2, 1, 1), (1, 2, 1)):
            torch.set_num_threads(requested)
            monkeypatch.setattr(placement, "available_cpus", lambda allowed=allowed: allowed)
            placement.limit_torch_threads()
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_missing_device_is_rejected(device, gpus):
    gpus()
    with pytest.raises(UserError, match=f"has no {device} device.*glm doctor"):
        choose_placement(MODEL_CONFIG, device)


def test_the_cpu_can_be_chosen_on_a_machine_with_a_gpu(gpus):
    gpus(80 * GB)
    assert choose_placement(MODEL_CONFIG, "cpu", "float32") == Placement({"": "cpu"}, torch.float32)


@pytest.mark.parametrize(("dtype", "needed"), [("float32", "27.5"), ("bfloat16", "13.7")])
def test_too_little_memory_is_reported_before_loading_with_both_sizes(dtype, needed, gpus, monkeypatch):
    """6.24e9 parameters of 4 or 2 bytes, plus a tenth for the conversation."""
    gpus()
    monkeypatch.setattr(placement, "available_memory", lambda: 8 * GB)
    with pytest.raises(UserError, match=rf"needs {needed} GB of memory in .*{dtype}, 8\.0 GB are available"):
        choose_placement(CHATGLM3_6B, "cpu", dtype)


def test_a_placement_is_printed_as_devices_and_precision():
    assert str(Placement({"a": "cuda:0", "b": "cuda:0", "c": "cuda:1"}, torch.float16)) == "cuda:0, cuda:1 in float16"


@pytest.mark.parametrize(("load_in", "gigabytes"), [("8bit", 6.78), ("4bit", 4.28)])
def test_8_and_4_bits_make_the_6b_fit_smaller_gpus(load_in, gigabytes, gpus):
    """Embedding and output layer, 0.53e9 parameters, stay in 16 bits; 4 bits have a scale for every 64 parameters."""
    assert placement.quantized_weight_bytes(CHATGLM3_6B, load_in, 2) / 1e9 == pytest.approx(gigabytes, abs=0.01)
    gpus(8 * GB)
    assert set(choose_placement(CHATGLM3_6B, load_in=load_in).device_map.values()) == {"cuda:0"}
    gpus(4 * GB)
    with pytest.raises(UserError, match=r"the GPUs have 4.0 GB free"):
        choose_placement(CHATGLM3_6B, load_in=load_in)


def test_bitsandbytes_is_rejected_on_apple_gpus(gpus, monkeypatch):
    gpus()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"does not support 4 bits on mps; use a GGUF file: glm quantize"):
        choose_placement(MODEL_CONFIG, load_in="4bit")
    assert set(choose_placement(MODEL_CONFIG, "cpu", load_in="4bit").device_map.values()) == {"cpu"}


def test_a_cpu_needs_more_memory_to_quantize_than_to_load_quantized_files(gpus, monkeypatch):
    """The largest matrix of the 6B has 112e6 parameters, and several are quantized at the same time."""
    gpus()
    monkeypatch.setattr(placement, "available_memory", lambda: 5 * GB)
    assert set(
        choose_placement(CHATGLM3_6B, "cpu", "bfloat16", "4bit", already_quantized=True).device_map.values()
    ) == {"cpu"}
    with pytest.raises(UserError, match=r"needs 5\.6 GB of memory"):
        choose_placement(CHATGLM3_6B, "cpu", "bfloat16", "4bit")


def test_a_model_split_over_two_devices_answers_like_the_unsplit_one(toy_native, monkeypatch):
    """The layers of the second half are offloaded to disk, the only second device on a machine with a CPU alone."""
    unsplit = TransformersEngine.load(toy_native, EngineOptions(device="cpu", dtype="float32"))
    stages = {"cpu:0": "cpu", "cpu:1": "disk"}
    halves = {name: stages[stage] for name, stage in layer_device_map(MODEL_CONFIG, 2, "cpu").items()}
    on_disk = [halves[f"model.layers.{number}"] == "disk" for number in range(MODEL_CONFIG.num_layers)]
    assert sorted(set(on_disk)) == [False, True]
    monkeypatch.setattr(engine, "choose_placement", lambda *_, **__: Placement(halves, torch.float32))
    split = TransformersEngine.load(toy_native, EngineOptions(slots=4))
    layers = split.model.model.layers
    assert [next(layer.parameters()).is_meta for layer in layers] == on_disk
    assert split.slots == 1  # batching is for one device
    prompts = [[300, 301, 302, 303], [310, 311]]
    greedy = Sampling(max_new_tokens=12, temperature=0)
    for prompt in prompts:
        assert list(split.generate(prompt, greedy)) == list(unsplit.generate(prompt, greedy))
    assert split.generate_batch(prompts, greedy) == unsplit.generate_batch(prompts, greedy)
