"""What vLLM is told, with a stand-in for its view of the machine: no GPU was ever there to ask."""

import dataclasses
import json
import os
import sys
import types
from pathlib import Path

import pytest

from entrypoints.checkpoint.adapters import Adapter
from entrypoints.checkpoint.layout import Shape
from entrypoints.demo.model import SHAPE
from entrypoints.engines import vllm_settings
from entrypoints.engines.vllm_settings import device_settings, lora_settings, prepare, refuse_prefixes
from entrypoints.errors import UserError
from entrypoints.prompt import PromptFormat

GIB = 1 << 30
REAL = Shape(  # the 6B: 12.5 GB in two bytes a number
    layers=28,
    hidden=4096,
    heads=32,
    groups=2,
    head_dim=128,
    ffn=13696,
    vocabulary=65024,
    window=8192,
    norm_eps=1e-5,
    rope_ratio=1,
)


@dataclasses.dataclass
class Machine:
    """The part of vllm.platforms.current_platform that is asked."""

    kind: str = "cuda"
    memory: tuple[int, ...] = (80 * GIB,)
    capability: int = 80

    def is_cuda_alike(self) -> bool:
        return self.kind == "cuda"

    def is_cpu(self) -> bool:
        return self.kind == "cpu"

    def has_device_capability(self, least: int) -> bool:
        return self.capability >= least

    def device_count(self) -> int:
        return len(self.memory)

    def get_device_total_memory(self, number: int) -> int:
        return self.memory[number]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch):
    """Make vLLM see this machine; what it leaves in the environment goes again."""
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def use(machine: Machine) -> None:
        platforms = types.ModuleType("vllm.platforms")
        platforms.current_platform = machine
        monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
        monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)

    return use


def lora(folder: Path, rank: int) -> Adapter:
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    return Adapter(folder, PromptFormat())


@pytest.mark.parametrize(
    ("memory", "capability", "dtype", "count"),
    [
        ((80,), 80, "bfloat16", 1),
        ((16,), 75, "float16", 1),
        ((12, 12), 80, "bfloat16", 2),
        ((6, 6, 6, 6, 6), 80, "bfloat16", 4),  # three would do, but 32 heads cannot be dealt out to three
    ],
)
def test_gpus_get_the_precision_they_have_and_as_few_as_hold_the_weights(on, memory, capability, dtype, count):
    on(Machine(memory=tuple(size * GIB for size in memory), capability=capability))
    assert device_settings(REAL, 4, "cuda", "auto", None, 0.9) == {
        "dtype": dtype,
        "tensor_parallel_size": count,
        "gpu_memory_utilization": 0.9,
    }


def test_what_is_asked_for_goes_before_what_would_be_chosen(on):
    on(Machine(memory=(80 * GIB,) * 4))
    settings = device_settings(REAL, 4, "cuda", "float16", 4, 0.5)
    assert settings == {"dtype": "float16", "tensor_parallel_size": 4, "gpu_memory_utilization": 0.5}


def test_eight_bits_are_made_by_vllm_and_need_half_the_memory(on):
    on(Machine(memory=(10 * GIB,)))
    assert device_settings(REAL, 4, "cuda", "auto", None, 0.9, "8bit") == {
        "dtype": "bfloat16",
        "tensor_parallel_size": 1,
        "gpu_memory_utilization": 0.9,
        "quantization": "fp8_per_channel",
    }


@pytest.mark.parametrize(("dtype", "capability"), [("float32", 80), ("auto", 70)])
def test_eight_bits_without_half_precision_or_on_an_old_gpu_are_refused(dtype, capability, on):
    on(Machine(memory=(80 * GIB,), capability=capability))
    with pytest.raises(UserError, match=r"need --dtype bfloat16 or float16 and a GPU of compute capability 7\.5"):
        device_settings(REAL, 4, "cuda", dtype, None, 0.9, "8bit")


def test_eight_bits_on_a_processor_are_refused():
    with pytest.raises(UserError, match="vLLM makes 8 bits on GPUs alone; leave out --load-in"):
        device_settings(SHAPE, 4, "cpu", "bfloat16", None, 0.9, "8bit")


def test_gpus_that_are_too_small_are_refused_with_the_numbers(on):
    on(Machine(memory=(4 * GIB,)))
    with pytest.raises(UserError, match=r"needs 13\.7 GB, the GPUs have 3\.9 GB"):
        device_settings(REAL, 4, "cuda", "auto", None, 0.9)


def test_gpus_among_which_the_heads_cannot_be_dealt_out_are_refused(on):
    on(Machine(memory=(6 * GIB,) * 3))
    with pytest.raises(UserError, match="32 heads cannot be split over 3"):
        device_settings(REAL, 4, "cuda", "auto", None, 0.9)


def test_on_a_processor_the_cache_holds_all_slots_and_no_more():
    settings = device_settings(SHAPE, 4, "cpu", "float32", None, 0.9)
    pages = 4 * 1024 // 128 + 1
    assert settings["kv_cache_memory_bytes"] == pages * 128 * 4 * 2 * 2 * 32 * 4  # layers, k and v, groups, head, bytes
    assert settings["enforce_eager"] is True


def test_too_little_memory_for_the_slots_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vllm_settings, "available_memory", lambda: 10**7)
    with pytest.raises(UserError, match=r"4 slots of 1024 tokens needs 0\.0 GB"):
        device_settings(SHAPE, 4, "cpu", "float32", None, 0.9)


@pytest.mark.parametrize(
    ("kind", "device", "words"),
    [
        ("cuda", "cpu", "built for cuda, not for --device cpu"),
        ("cpu", "mps", "built for cpu, not for --device mps"),
        ("none", "auto", "finds no device"),
    ],
)
def test_a_device_that_vllm_was_not_built_for_is_refused(on, kind, device, words):
    on(Machine(kind=kind))
    with pytest.raises(UserError, match=words):
        prepare(device)


def test_a_missing_vllm_is_told_in_words(on, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "vllm.platforms", None)
    with pytest.raises(UserError, match="vllm cannot be imported"):
        prepare("auto")


def test_vllm_tells_nobody_and_asks_nobody_unless_the_user_says_so(on):
    on(Machine())
    os.environ["VLLM_LOGGING_LEVEL"] = "DEBUG"
    assert prepare("auto") == "cuda"
    told = {"VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1"}
    assert told.items() <= os.environ.items()
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert "TORCHDYNAMO_DISABLE" not in os.environ


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (4, 8), (8, 8), (9, 16), (512, 512)])
def test_a_lora_gets_the_next_rank_that_vllm_has_room_for(tmp_path: Path, rank: int, room: int):
    settings = lora_settings({"tuned": lora(tmp_path, rank)}, "cuda")
    assert settings == {"enable_lora": True, "max_lora_rank": room, "max_loras": 1}


def test_a_rank_beyond_all_is_refused_by_name(tmp_path: Path):
    with pytest.raises(UserError, match="up to rank 512: tuned has 513"):
        lora_settings({"tuned": lora(tmp_path, 513)}, "cuda")


def test_without_adapters_lora_stays_off():
    assert lora_settings({}, "cuda") == {}


def test_on_a_processor_one_place_for_adapters_stays_empty(tmp_path: Path):
    """vllm-project/vllm#48421: answers without an adapter take the last place's weights."""
    assert lora_settings({"tuned": lora(tmp_path, 8)}, "cpu")["max_loras"] == 2


def test_prefixes_are_refused_by_name(tmp_path: Path):
    adapters = {"plain": Adapter(tmp_path, PromptFormat()), "soft": Adapter(tmp_path, PromptFormat(), pre_seq_len=8)}
    with pytest.raises(UserError, match=r"P-Tuning v2 adapters: soft; "):
        refuse_prefixes(adapters)
