"""What the locked vLLM would run on GPUs: nothing may call a compiler that the image infer-cuda does not have."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from entrypoints.engines.vllm.engine_args import NGRAM_SPECULATION
from entrypoints.engines.vllm.gpu_settings import GPU_ENVIRONMENT

PROGRAM = Path(__file__).with_name("pretended_gpu.py")
REPOSITORY = Path(__file__).resolve().parents[2]
COMPILERS = re.compile("FLASHINFER|DEEP_GEMM|HUMMING|TILELANG|CUTE_?DSL|QUACK|OINK|CUBIN")
# On by default, and without effect: settings of what GPU_ENVIRONMENT switches off, and of layers that GLM does not have
WITHOUT_EFFECT = {
    "VLLM_DEEP_GEMM_WARMUP",
    "VLLM_FLASHINFER_ALLREDUCE_BACKEND",
    "VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE",
    "VLLM_MOE_USE_DEEP_GEMM",
    "VLLM_USE_DEEP_GEMM_E8M0",
    "VLLM_USE_DEEP_GEMM_TMA_ALIGNED_SCALES",
}


def test_no_other_run_time_compiler_is_on_by_default():
    """A new name here means that vLLM got one: read what it compiles for GLM, then switch it off or list it."""
    from vllm import envs

    names = [name for name in envs.environment_variables if COMPILERS.search(name)]
    assert len(names) >= 15
    on = {name for name in names if name not in os.environ and getattr(envs, name)}
    assert on | GPU_ENVIRONMENT.keys() == GPU_ENVIRONMENT.keys() | WITHOUT_EFFECT


@pytest.mark.parametrize(
    ("capability", "default_attention", "batch_tokens", "linear"),
    [
        ("7.5", "TRITON_ATTN", 2048, "MarlinFP8ScaledMMLinearKernel"),
        ("8.0", "FLASH_ATTN", 2048, "MarlinFP8ScaledMMLinearKernel"),
        ("8.9", "FLASH_ATTN", 2048, "CutlassFP8ScaledMMLinearKernel"),
        ("9.0", "FLASH_ATTN", 8192, "CutlassFP8ScaledMMLinearKernel"),
        ("10.0", "FLASHINFER", 8192, "CutlassFP8ScaledMMLinearKernel"),
    ],
)
def test_nothing_on_a_gpu_runs_in_flashinfer(toy: Path, capability, default_attention, batch_tokens, linear):
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, PROGRAM, toy, capability], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    defaults = {"attention": default_attention, "sampler": "vLLM" if capability == "7.5" else "FlashInfer"}
    assert found["defaults"] | defaults == found["defaults"]
    assert found["ours"] == {
        "attention": "TRITON_ATTN" if capability == "7.5" else "FLASH_ATTN",
        "sampler": "vLLM",
        "batch_tokens": batch_tokens,
        "sequences": 64,
        "prefix_caching": True,
        "cuda_graphs": "FULL_AND_PIECEWISE",
        "cuda_graphs_with_lora": True,
        "fused_all_reduce": False,
        "flashinfer_autotune": False,
        "linear": None,
    }
    assert found["eager"] == found["ours"] | {"cuda_graphs": "NONE"}
    assert found["8bit"] == found["ours"] | {"linear": linear}


def test_the_speculation_is_one_that_vllm_has():
    from typing import get_args

    from vllm.config.speculative import SpeculativeMethod

    assert NGRAM_SPECULATION["method"] in get_args(SpeculativeMethod)
