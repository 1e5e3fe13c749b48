"""What `glm doctor` says is missing, each with its remedy. Traps J1, J2 and J3 of the list of reported pains."""

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from entrypoints.engines import diagnosis
from entrypoints.engines.driver import MINIMUM_DRIVERS

GB = 10**9
REPOSITORY = Path(__file__).resolve().parents[3]
MODULE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\nGCC version: 12\n"
OPEN_MODULE = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build  (root@host)\n"


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Say what the kernel tells of NVIDIA's module; None for nothing."""

    def say(text):
        file = tmp_path / "version"
        if text:
            file.write_text(text)
        monkeypatch.setattr(diagnosis, "KERNEL_MODULE", file)

    return say


@pytest.fixture
def library(tmp_path):
    """A stand-in for the driver's library that answers with a version, counted as CUDA does."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to make a stand-in for the driver's library with")

    def make(version):
        source = tmp_path / "driver.c"
        source.write_text(f"int cuDriverGetVersion(int *version) {{ *version = {version}; return 0; }}")
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so", source], check=True)
        return str(tmp_path / "libcuda.so")

    return make


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    """Only these programs are there, and this is no container."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(diagnosis, "IN_CONTAINER", ())

    def put(*names):
        for name in names:
            (tmp_path / name).write_text("#!/bin/sh\n")
            (tmp_path / name).chmod(0o755)

    return put


def test_no_driver_is_told_with_what_it_would_be_for(kernel):
    kernel(None)
    assert diagnosis.driver("libcuda-that-is-not-there.so.1").startswith("none; install NVIDIA's driver")


@pytest.mark.parametrize(("text", "branch"), [(MODULE, "550.54.14"), (OPEN_MODULE, "570.86.10")])
def test_a_container_started_without_its_gpus_is_told_apart_from_no_driver(text, branch, kernel):
    kernel(text)
    words = diagnosis.driver("libcuda-that-is-not-there.so.1")
    assert words == f"{branch} in the kernel, but libcuda.so.1 is not here; start the container with --gpus all"


@pytest.mark.parametrize(
    ("built_for", "words"),
    [
        ("12.6", "550.54.14, for CUDA 12.4, new enough for this torch"),
        ("13.0", "too old: the driver is for CUDA 12.4, this torch was built for 13.0; install driver 580"),
        (None, "550.54.14, for CUDA 12.4, but this torch is for processors; set up with TORCH=cuda"),
    ],
)
def test_a_driver_is_held_against_the_torch_that_is_installed(built_for, words, kernel, library, monkeypatch):
    kernel(MODULE)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    assert diagnosis.driver(library(12040)).startswith(words)
    assert MINIMUM_DRIVERS[13] == "580"


@pytest.mark.parametrize("name", diagnosis.TOOLKIT)
def test_the_toolkit_is_found_by_either_of_its_programs(name, on_path, kernel):
    kernel(MODULE)
    on_path(name)
    assert diagnosis.container_toolkit().startswith(f"{name}; compose/gpu-ready says")


def test_a_toolkit_that_is_missing_beside_a_driver_is_told_with_its_package(on_path, kernel):
    kernel(MODULE)
    assert diagnosis.container_toolkit().endswith("install the package nvidia-container-toolkit")


def test_without_a_driver_no_toolkit_is_missed(on_path, kernel):
    kernel(None)
    assert diagnosis.container_toolkit() == "none; without a driver none is needed"


def test_inside_a_container_the_toolkit_is_not_looked_for(on_path, kernel, monkeypatch, tmp_path):
    kernel(MODULE)
    monkeypatch.setattr(diagnosis, "IN_CONTAINER", (tmp_path,))
    assert "ask there" in diagnosis.container_toolkit()


def test_it_says_the_same_of_the_toolkit_as_the_check_for_compose(on_path):
    """compose/gpu-ready looks for the same programs, and names the same package."""
    script = (REPOSITORY / "compose" / "gpu-ready").read_text()
    assert all(f"command -v {name} " in script for name in diagnosis.TOOLKIT)
    assert "install the package nvidia-container-toolkit" in script


@pytest.mark.parametrize(
    ("free", "limit", "words"),
    [
        (20 * GB, None, "20.0 GB available"),
        (20 * GB, 32 * GB, "20.0 GB available, 32.0 GB are the control group's limit"),
        (3 * GB, None, "3.0 GB available; the 6B as q4_0 needs 5.1: free some"),
        (3 * GB, 4 * GB, "3.0 GB available, 4.0 GB are the control group's limit; the 6B as q4_0 needs 5.1: raise the"),
    ],
)
def test_little_memory_is_told_with_who_can_give_more(free, limit, words, monkeypatch):
    monkeypatch.setattr(diagnosis, "available_memory", lambda: free)
    monkeypatch.setattr(diagnosis, "memory_limit", lambda: limit)
    assert diagnosis.memory().startswith(words)


def test_a_share_of_the_processors_is_told_with_what_gives_more(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(diagnosis, "available_cpus", lambda: 8)
    assert diagnosis.processors() == "8"
    monkeypatch.setattr(diagnosis, "available_cpus", lambda: 2)
    assert diagnosis.processors().startswith("2 of 8, by affinity or the control group's quota; --cpus or")


@pytest.mark.parametrize(("free", "few"), [(64 << 20, True), (2 * GB, False)])
def test_little_shared_memory_is_told_with_its_remedy(free, few, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    assert ("--shm-size" in diagnosis.shared_memory()) is few


@pytest.mark.parametrize(("free", "few"), [(10 * GB, True), (26 * GB, False)])
def test_a_disk_too_small_for_the_6b_is_told(free, few, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    assert ("fetching and converting the 6B takes 25" in diagnosis.disk(tmp_path)) is few
