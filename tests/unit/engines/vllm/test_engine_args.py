"""Arguments for vLLM, with a fake of its platform interface: no GPU is needed."""

import dataclasses
import json
import os
import sys
import types
from pathlib import Path

import pytest

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.checkpoint.adapters import Adapter
from entrypoints.demo.model import MODEL_CONFIG
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.vllm import engine_args
from entrypoints.engines.vllm.engine_args import check_adapters, device_settings, lora_settings, prepare
from entrypoints.errors import UserError


@dataclasses.dataclass
class Machine:
    """The used part of vllm.platforms.current_platform."""

    kind: str = "cuda"

    def is_cuda_alike(self) -> bool:
        return self.kind == "cuda"

    def is_cpu(self) -> bool:
        return self.kind == "cpu"


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch):
    """Makes vLLM report this machine; restores the environment variables afterwards."""
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


def test_on_a_cpu_the_kv_cache_holds_all_slots_and_no_more():
    settings = device_settings(MODEL_CONFIG, "cpu", EngineOptions(slots=4, dtype="float32"))
    pages = 4 * 1024 // 128 + 1
    assert settings["kv_cache_memory_bytes"] == pages * 128 * 4 * 2 * 2 * 32 * 4  # layers, k and v, groups, head, bytes
    assert settings["enforce_eager"] is True


def test_load_in_8bit_on_a_cpu_is_rejected():
    with pytest.raises(UserError, match="vLLM supports --load-in on GPUs only; omit --load-in"):
        device_settings(MODEL_CONFIG, "cpu", EngineOptions(slots=4, dtype="bfloat16", load_in="8bit"))


def test_insufficient_memory_for_the_slots_is_rejected(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_args, "available_memory", lambda: 10**7)
    with pytest.raises(UserError, match=r"--slots 4 of 1024 tokens needs \S+ [kM]B"):
        device_settings(MODEL_CONFIG, "cpu", EngineOptions(slots=4, dtype="float32"))


@pytest.mark.parametrize(
    ("kind", "device", "message"),
    [
        ("cuda", "cpu", "built for cuda, not for --device cpu"),
        ("cpu", "mps", "built for cpu, not for --device mps"),
        ("none", "auto", "finds no device"),
    ],
)
def test_a_device_that_vllm_was_not_built_for_is_rejected(on, kind, device, message):
    on(Machine(kind=kind))
    with pytest.raises(UserError, match=message):
        prepare(device)


def test_a_missing_vllm_is_a_user_error(on, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "vllm.platforms", None)
    with pytest.raises(UserError, match="vllm cannot be imported"):
        prepare("auto")


def test_vllm_sends_no_usage_data_and_makes_no_network_request_unless_configured(on):
    on(Machine())
    os.environ["VLLM_LOGGING_LEVEL"] = "DEBUG"
    assert prepare("auto") == "cuda"
    expected = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
    }
    assert expected.items() <= os.environ.items()
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert "TORCHDYNAMO_DISABLE" not in os.environ


@pytest.mark.parametrize(("rank", "max_rank"), [(1, 1), (4, 8), (8, 8), (9, 16), (512, 512)])
def test_a_lora_gets_the_next_rank_that_vllm_supports(tmp_path: Path, rank: int, max_rank: int):
    settings = lora_settings({"tuned": lora(tmp_path, rank)}, "cuda")
    assert settings == {"enable_lora": True, "max_lora_rank": max_rank, "max_loras": 1}


def test_a_rank_that_is_too_high_is_rejected_by_name(tmp_path: Path):
    with pytest.raises(UserError, match="up to rank 512: tuned has 513"):
        lora_settings({"tuned": lora(tmp_path, 513)}, "cuda")


def test_without_adapters_lora_stays_off():
    assert lora_settings({}, "cuda") == {}


def test_on_a_cpu_one_adapter_entry_stays_empty(tmp_path: Path):
    """vllm-project/vllm#48421: answers without an adapter use the weights of the last entry."""
    assert lora_settings({"tuned": lora(tmp_path, 8)}, "cpu")["max_loras"] == 2


def test_prefix_adapters_are_rejected_by_name(tmp_path: Path):
    adapters = {"plain": Adapter(tmp_path, PromptFormat()), "soft": Adapter(tmp_path, PromptFormat(), pre_seq_len=8)}
    with pytest.raises(UserError, match=r"P-Tuning v2 adapters: soft; "):
        check_adapters(adapters)
