"""Where models go and in which precision. Trap names (C6, C7) are those of the list of reported pains."""

import itertools

import accelerate
import peft
import pytest
import torch
import transformers

from entrypoints.checkpoint.layout import Shape
from entrypoints.checkpoint.native import open_native
from entrypoints.demo.model import SHAPE
from entrypoints.engines import machine, placement, transformers_engine
from entrypoints.engines.placement import Placement, gpus_needed, place, spread, weight_bytes
from entrypoints.engines.prefix import PrefixedGlm
from entrypoints.engines.transformers_engine import TransformersEngine
from entrypoints.errors import UserError
from entrypoints.sampling import Sampling

# config.json of chatglm3-6b
CHATGLM3_6B = Shape(28, 4096, 32, 2, 128, 13696, 65024, 8192, 1e-5, 1)
GB = 10**9


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that this machine has CUDA devices with so many free bytes, and bfloat16 or not."""

    def pretend(*free, bf16=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(free))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (free[number], 80 * GB))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 or including_emulation)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    return pretend


def test_chatglm3_6b_has_the_published_number_of_parameters():
    """6,243,584,000: transformers' count for THUDM/chatglm3-6b; 12.49 GB in 16 bits."""
    assert weight_bytes(CHATGLM3_6B, 1) == 6_243_584_000


def test_the_toys_weight_bytes_are_those_of_its_files(toy_native):
    assert weight_bytes(SHAPE, 2) == open_native(toy_native).files.size


def meta_model(kind, shape):
    """A model of the shape without memory: plain, with LoRA around it, or with a prefix."""
    config = transformers.GlmConfig(**shape.native_config("float32", (2,), 0))
    with torch.device("meta"):
        model = (PrefixedGlm if kind == "prefix" else transformers.GlmForCausalLM)(config)
        if kind == "lora":
            targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
            model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets))
    return model


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["plain", "lora", "prefix"])
@pytest.mark.parametrize("shape", [SHAPE, CHATGLM3_6B], ids=["toy", "6b"])
def test_every_parameter_has_a_device_and_layers_lie_in_order(count, kind, shape):
    """C7: the names come from the model itself, whatever is wrapped around it."""
    device_map = spread(shape, count)
    inner = "base_model.model." if kind == "lora" else ""
    devices = {}
    for name, _ in itertools.chain(*((lambda m: (m.named_parameters(), m.named_buffers()))(meta_model(kind, shape)))):
        found = [place for place in device_map if f"{name}.".startswith(f"{inner}{place}.")]
        assert len(found) == 1, name
        devices.setdefault(found[0], device_map[found[0]])
    assert devices.keys() == device_map.keys()
    layers = [int(device_map[f"model.layers.{number}"].removeprefix("cuda:")) for number in range(shape.layers)]
    assert layers == sorted(layers)
    assert set(layers) | {0} == set(range(count))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_embedding_norm_and_output_layer_share_the_first_device(count):
    """C7: a tensor of one is never multiplied with one of another."""
    device_map = spread(CHATGLM3_6B, count)
    ends = [device_map[name] for name in ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")]
    assert ends == ["cuda:0"] * 4


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["plain", "prefix"])
def test_the_library_that_spreads_models_accepts_the_map(count, kind):
    """C7: "does not give any device for ..." is what it says otherwise."""
    accelerate.utils.check_device_map(meta_model(kind, SHAPE), spread(SHAPE, count))


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
def test_as_few_of_the_first_gpus_are_used_as_hold_the_model(needed, free, count):
    """Each takes an equal share, so the fullest one decides."""
    assert gpus_needed(needed, free) == count


def test_gpus_too_small_together_are_refused_with_every_number():
    with pytest.raises(UserError, match=r"needs 13\.7 GB, the GPUs have 6\.0, 5\.0 GB free"):
        gpus_needed(13_700_000_000, [6 * GB, 5 * GB])


@pytest.mark.parametrize(
    ("bf16", "dtype", "expected"),
    [
        (True, "auto", torch.bfloat16),
        (False, "auto", torch.float16),
        (False, "bfloat16", torch.bfloat16),
        (True, "float32", torch.float32),
    ],
)
def test_a_gpu_computes_in_bfloat16_where_it_can_and_in_float16_elsewhere(bf16, dtype, expected, gpus):
    """C6: V100 and T4 have no bfloat16; a named precision is taken."""
    gpus(80 * GB, bf16=bf16)
    chosen = place(CHATGLM3_6B, "auto", dtype)
    assert (chosen.dtype, set(chosen.device_map.values())) == (expected, {"cuda:0"})


def test_two_gpus_are_used_when_one_is_too_small(gpus):
    gpus(10 * GB, 10 * GB)
    assert sorted(set(place(CHATGLM3_6B).device_map.values())) == ["cuda:0", "cuda:1"]


def test_an_apple_gpu_computes_in_float16(monkeypatch, gpus):
    """C6."""
    gpus()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert place(SHAPE) == Placement({"": "mps"}, torch.float16)


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_processor_computes_in_bfloat16_only_where_it_has_it(native, expected, gpus, monkeypatch):
    """C6: never in float16, for which some operations are missing."""
    gpus()
    monkeypatch.setattr(placement, "cpu_computes_bf16", lambda: native)
    assert place(SHAPE) == Placement({"": "cpu"}, expected)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags : fpu avx2 avx512f", False),
        ("flags : fpu avx512_bf16", True),
        ("Features : fp asimd bf16 i8mm", True),
        ("", False),
    ],
)
def test_the_processors_flags_tell_whether_it_has_bfloat16(flags, expected, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    monkeypatch.setattr(machine, "PROCESSOR", tmp_path / "cpuinfo")
    assert placement.cpu_computes_bf16() is expected


def test_torch_computes_with_as_many_threads_as_the_quota_allows(monkeypatch):
    """And never with more than OMP_NUM_THREADS asked for."""
    before = torch.get_num_threads()
    try:
        for asked, allowed, expected in ((2, 1, 1), (1, 2, 1)):
            torch.set_num_threads(asked)
            monkeypatch.setattr(placement, "available_cpus", lambda allowed=allowed: allowed)
            placement.share_processors()
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(device, gpus):
    gpus()
    with pytest.raises(UserError, match=f"has no {device} device.*glm doctor"):
        place(SHAPE, device)


def test_the_processor_can_be_chosen_beside_a_gpu(gpus):
    gpus(80 * GB)
    assert place(SHAPE, "cpu", "float32") == Placement({"": "cpu"}, torch.float32)


@pytest.mark.parametrize(("dtype", "needed"), [("float32", "27.5"), ("bfloat16", "13.7")])
def test_too_little_memory_is_told_before_loading_with_both_numbers(dtype, needed, gpus, monkeypatch):
    """C6: 6.24e9 parameters of 4 or 2 bytes, and a tenth for the conversation."""
    gpus()
    monkeypatch.setattr(placement, "available_memory", lambda: 8 * GB)
    with pytest.raises(UserError, match=rf"needs {needed} GB of memory in .*{dtype}, 8\.0 GB are available"):
        place(CHATGLM3_6B, "cpu", dtype)


def test_a_placement_reads_as_devices_and_precision():
    assert str(Placement({"a": "cuda:0", "b": "cuda:0", "c": "cuda:1"}, torch.float16)) == "cuda:0, cuda:1 in float16"


@pytest.mark.parametrize(("load_in", "gigabytes"), [("8bit", 6.78), ("4bit", 4.28)])
def test_fewer_bits_make_the_6b_fit_smaller_gpus(load_in, gigabytes, gpus):
    """Embedding and output layer, 0.53 billion numbers, stay in 16 bits; 4 bits have a scale for every 64 numbers."""
    assert placement.loaded_bytes(CHATGLM3_6B, load_in, 2) / 1e9 == pytest.approx(gigabytes, abs=0.01)
    gpus(8 * GB)
    assert set(place(CHATGLM3_6B, load_in=load_in).device_map.values()) == {"cuda:0"}
    gpus(4 * GB)
    with pytest.raises(UserError, match=r"the GPUs have 4.0 GB free"):
        place(CHATGLM3_6B, load_in=load_in)


def test_bitsandbytes_is_not_for_apples_gpus(gpus, monkeypatch):
    gpus()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"does not compute in 4 bits on mps; use a GGUF file: glm quantize"):
        place(SHAPE, load_in="4bit")
    assert set(place(SHAPE, "cpu", load_in="4bit").device_map.values()) == {"cpu"}


def test_a_processor_needs_more_to_make_fewer_bits_than_to_read_them(gpus, monkeypatch):
    """The largest matrix of the 6B has 112 million numbers, and some are made smaller at the same time."""
    gpus()
    monkeypatch.setattr(placement, "available_memory", lambda: 5 * GB)
    assert set(place(CHATGLM3_6B, "cpu", "bfloat16", "4bit", stored=True).device_map.values()) == {"cpu"}
    with pytest.raises(UserError, match=r"needs 5\.6 GB of memory"):
        place(CHATGLM3_6B, "cpu", "bfloat16", "4bit")


def test_a_model_split_in_two_answers_as_the_whole_one(toy_native, monkeypatch):
    """C7: the second half's layers come from the disk whenever they run, the only other place a processor has."""
    whole = TransformersEngine.load(toy_native, device="cpu", dtype="float32")
    stages = {"cpu:0": "cpu", "cpu:1": "disk"}
    halves = {name: stages[stage] for name, stage in spread(SHAPE, 2, "cpu").items()}
    on_disk = [halves[f"model.layers.{number}"] == "disk" for number in range(SHAPE.layers)]
    assert sorted(set(on_disk)) == [False, True]
    monkeypatch.setattr(transformers_engine, "place", lambda *_, **__: Placement(halves, torch.float32))
    split = TransformersEngine.load_for_serving(toy_native, {}, slots=4)
    layers = split.model.model.layers
    assert [next(layer.parameters()).is_meta for layer in layers] == on_disk
    assert split.slots == 1  # batching is for one device
    prompts = [[300, 301, 302, 303], [310, 311]]
    greedy = Sampling(max_new_tokens=12, temperature=0)
    for prompt in prompts:
        assert list(split.generate(prompt, greedy)) == list(whole.generate(prompt, greedy))
    assert split.generate_batch(prompts, greedy) == whole.generate_batch(prompts, greedy)
