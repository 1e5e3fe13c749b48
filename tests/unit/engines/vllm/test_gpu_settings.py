"""Settings of vLLM for GPUs that this machine does not have."""

import dataclasses
import re
from pathlib import Path

import pytest
from dimensions import CHATGLM3_6B, GLM4_9B

from entrypoints.checkpoint.native import open_native
from entrypoints.engines.loading import default_slots
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.vllm import gpu_settings as module
from entrypoints.engines.vllm.gpu_settings import gpu_settings
from entrypoints.errors import UserError
from entrypoints.hardware import gpus
from entrypoints.hardware.gpus import Gpu, check_compute_capability

REPOSITORY = Path(__file__).resolve().parents[4]
GIB = 1 << 30


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Pretends that these GPUs are visible; memory in GiB."""

    def use(*memory: float, capability: tuple[int, int] = (8, 0), used: float = 0.3) -> None:
        found = [Gpu("Pretended", int(size * GIB), int((size - used) * GIB), capability) for size in memory]
        monkeypatch.setattr(module, "list_gpus", lambda: found)
        monkeypatch.setattr(gpus, "list_gpus", lambda: found)

    return use


@pytest.mark.parametrize(
    ("memory", "capability", "dtype", "sizes"),
    [
        ((80,), (8, 0), "bfloat16", (1, 1)),
        ((16,), (7, 5), "float16", (1, 1)),
        ((24, 24, 24, 24), (8, 9), "bfloat16", (1, 4)),
        ((12, 12), (8, 0), "bfloat16", (2, 1)),
        ((12, 12, 12, 12, 12), (8, 0), "bfloat16", (2, 2)),  # the fifth holds no half of a copy
        (
            (6, 6, 6, 6, 6),
            (8, 0),
            "bfloat16",
            (4, 1),
        ),  # three have enough memory, but 32 heads are not divided by three
        ((24, 8), (8, 0), "bfloat16", (1, 1)),  # the second holds no copy
        ((24, 24, 12), (8, 0), "bfloat16", (1, 2)),
        ((24, 8, 24), (8, 0), "bfloat16", (1, 1)),  # vLLM would give the second copy the second GPU
    ],
)
def test_each_copy_takes_the_fewest_gpus_and_the_copies_take_all(machine, memory, capability, dtype, sizes):
    machine(*memory, capability=capability)
    settings = gpu_settings(CHATGLM3_6B, EngineOptions(slots=256))
    assert settings["dtype"] == dtype
    assert (settings["tensor_parallel_size"], settings["data_parallel_size"]) == sizes
    assert settings["max_num_seqs"] == 256 // sizes[1]
    assert settings["gpu_memory_utilization"] == 0.9
    assert settings["enforce_eager"] is False


def test_explicit_options_override_the_selection(machine):
    machine(80, 80, 80, 80)
    options = EngineOptions(
        slots=10,
        dtype="float16",
        tensor_parallel_size=2,
        data_parallel_size=1,
        gpu_memory_utilization=0.5,
        enforce_eager=True,
    )
    settings = gpu_settings(CHATGLM3_6B, options)
    expected = {
        "dtype": "float16",
        "max_num_seqs": 10,
        "tensor_parallel_size": 2,
        "data_parallel_size": 1,
        "gpu_memory_utilization": 0.5,
        "enforce_eager": True,
    }
    assert expected.items() <= settings.items()


@pytest.mark.parametrize(
    ("capability", "dtype", "backend"),
    [
        ((7, 5), "auto", "TRITON_ATTN"),
        ((8, 0), "auto", "FLASH_ATTN"),
        ((8, 0), "float32", "TRITON_ATTN"),
        ((9, 0), "auto", "FLASH_ATTN"),
        ((10, 0), "auto", "FLASH_ATTN"),
        ((12, 0), "float16", "FLASH_ATTN"),
    ],
)
def test_attention_never_runs_in_flashinfer(machine, capability, dtype, backend):
    machine(80, capability=capability)
    settings = gpu_settings(CHATGLM3_6B, EngineOptions(dtype=dtype))
    assert settings["attention_config"] == {"backend": backend}


@pytest.mark.parametrize(
    ("capability", "quantization"),
    [((7, 5), "fp8_per_tensor"), ((8, 6), "fp8_per_tensor"), ((8, 9), "fp8_per_channel"), ((9, 0), "fp8_per_channel")],
)
def test_load_in_8bit_is_fp8_with_the_scales_that_the_card_multiplies(machine, capability, quantization):
    """Scales for each channel are refused by vLLM on GPUs that do not multiply in FP8 (Fp8PtpcOnlineLinearMethod)."""
    machine(10, capability=capability)
    settings = gpu_settings(CHATGLM3_6B, EngineOptions(slots=4, load_in="8bit"))
    assert settings["quantization"] == quantization
    assert settings["tensor_parallel_size"] == 1, "8 bits fit on one GPU of 10 GiB, 16 bits do not"


@pytest.mark.parametrize(("dtype", "capability"), [("float32", (8, 0)), ("auto", (7, 0))])
def test_load_in_8bit_with_float32_or_on_an_old_gpu_is_rejected(dtype, capability, machine):
    machine(80, capability=capability)
    with pytest.raises(UserError, match=r"needs --dtype bfloat16 or float16 and a GPU of compute capability 7\.5"):
        gpu_settings(CHATGLM3_6B, EngineOptions(dtype=dtype, load_in="8bit"))


def test_gpus_that_are_too_small_are_rejected_with_both_sizes(machine):
    machine(4)
    with pytest.raises(
        UserError, match=r"size 1 vLLM needs 14\.0 GB on each GPU .* may use 3\.9 GB .*; use --load-in 8bit"
    ):
        gpu_settings(CHATGLM3_6B, EngineOptions())
    machine(24, 8)
    with pytest.raises(UserError, match=r"needs 14\.0 GB .* may use 7\.7 GB"):
        gpu_settings(CHATGLM3_6B, EngineOptions(data_parallel_size=2))


def test_a_context_that_does_not_fit_beside_the_weights_is_rejected_and_the_shorter_one_of_the_remedy_fits(machine):
    """Otherwise vLLM ends with "To serve at least one request …" after it has loaded the weights."""
    machine(24)
    with pytest.raises(UserError, match=r"needs 26\.\d GB .* context of 131072 tokens.* may use 23\.2 GB") as error:
        gpu_settings(GLM4_9B, EngineOptions())
    context_length = int(re.findall(r"--context-length (\d+)", error.value.remedy)[0])
    assert gpu_settings(dataclasses.replace(GLM4_9B, context_length=context_length), EngineOptions())
    with pytest.raises(UserError):
        gpu_settings(dataclasses.replace(GLM4_9B, context_length=context_length + 1024), EngineOptions())
    machine(24, 24)
    assert gpu_settings(GLM4_9B, EngineOptions())["tensor_parallel_size"] == 2


def test_a_number_of_gpus_that_does_not_divide_the_heads_is_rejected(machine):
    machine(6, 6, 6)
    with pytest.raises(UserError, match=r"--tensor-parallel-size 2 vLLM needs .* \(1, 2, 4 or 8 for a copy\)"):
        gpu_settings(CHATGLM3_6B, EngineOptions())
    machine(80, 80, 80)
    with pytest.raises(UserError, match="--tensor-parallel-size 3 does not divide the 32 attention heads"):
        gpu_settings(CHATGLM3_6B, EngineOptions(tensor_parallel_size=3))


def test_more_gpus_than_are_visible_are_rejected(machine):
    machine(80, 80, 80)
    options = EngineOptions(tensor_parallel_size=2, data_parallel_size=2)
    with pytest.raises(UserError, match="2 times --data-parallel-size 2 is 4 GPUs, 3 are visible"):
        gpu_settings(CHATGLM3_6B, options)


def test_a_gpu_that_others_use_is_rejected_and_the_share_of_the_remedy_is_accepted(machine):
    machine(80, used=40)
    with pytest.raises(
        UserError, match=r"90% of the 85\.9 GB of GPU 0 .* 42\.6 GB are free beside its context"
    ) as error:
        gpu_settings(CHATGLM3_6B, EngineOptions())
    share = float(error.value.remedy.rpartition(" ")[2])
    assert share * 80 * GIB <= 40 * GIB - 300e6 < (share + 0.01) * 80 * GIB
    assert gpu_settings(CHATGLM3_6B, EngineOptions(gpu_memory_utilization=share))["gpu_memory_utilization"] == share


def test_vllm_on_gpus_runs_many_answers_at_a_time_if_nothing_is_said(
    machine, toy_native: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("entrypoints.engines.loading.require_engine_packages", lambda engine: None)
    machine(24)
    assert default_slots(toy_native, EngineOptions(engine="vllm")) == 256
    assert default_slots(toy_native, EngineOptions(engine="vllm", load_in="8bit")) == 256
    assert default_slots(toy_native, EngineOptions(engine="vllm", device="cpu")) == 4
    machine(24, 24, 24)
    assert default_slots(toy_native, EngineOptions(engine="vllm")) == 3 * 256
    assert default_slots(toy_native, EngineOptions(engine="vllm", tensor_parallel_size=2)) == 256
    machine()
    assert default_slots(toy_native, EngineOptions(engine="vllm")) == 4


@pytest.mark.parametrize(("gigabytes", "slots"), [(16, 4), (15.2, 3), (14.2, 1), (10, 1), (24, 4)])
def test_transformers_gets_by_default_no_more_slots_than_the_gpu_holds(
    gigabytes, slots, machine, toy_native: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a T4, 15.8 GB of 16.1 are free at best; four full contexts of the 6B need 15.7."""
    checkpoint = dataclasses.replace(open_native(toy_native), model_config=CHATGLM3_6B)
    monkeypatch.setattr("entrypoints.checkpoint.native.open_native", lambda folder, quantized: checkpoint)
    machine(gigabytes * 1e9 / GIB, used=0)
    assert default_slots(toy_native, EngineOptions(engine="transformers")) == slots
    assert default_slots(toy_native, EngineOptions(engine="transformers", load_in="4bit")) == 4


def test_a_gpu_older_than_the_build_of_torch_is_rejected_by_name(machine):
    machine(32, capability=(7, 0))
    with pytest.raises(UserError, match=r"Pretended has compute capability 7\.0, .* begins with 7\.5; .*cu126"):
        check_compute_capability(["sm_75", "sm_80", "sm_90", "sm_120"])
    check_compute_capability(["sm_50", "sm_70", "sm_90"])
    check_compute_capability([])  # a build without CUDA


def test_the_locks_have_the_vllm_whose_decisions_were_tested():
    """After an upgrade: run make test-vllm, which compares the decisions of vLLM for GPUs, then change this one."""
    for lock in ("infer-cuda-cuda", "infer-cuda-cpu"):
        text = (REPOSITORY / f"images/requirements/{lock}.lock").read_text()
        assert re.findall(r"^vllm(?:-cpu)?==(\S+)", text, re.MULTILINE) == ["0.32.0"]
