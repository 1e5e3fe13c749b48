"""The checks of `glm doctor` report what is missing, each with its remedy."""

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from entrypoints.doctor import checks
from entrypoints.hardware.cuda_driver import MINIMUM_DRIVERS

GB = 10**9
REPOSITORY = Path(__file__).resolve().parents[3]
MODULE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\nGCC version: 12\n"
OPEN_MODULE = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build  (root@host)\n"


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Set what the kernel reports about the NVIDIA module; None: no module."""

    def set_module(text):
        file = tmp_path / "version"
        if text:
            file.write_text(text)
        monkeypatch.setattr(checks, "KERNEL_MODULE", file)

    return set_module


@pytest.fixture
def library(tmp_path):
    """A fake driver library that reports a version in CUDA's encoding."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc to build a fake driver library")

    def build(version):
        source = tmp_path / "driver.c"
        source.write_text(f"int cuDriverGetVersion(int *version) {{ *version = {version}; return 0; }}")
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so", source], check=True)
        return str(tmp_path / "libcuda.so")

    return build


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    """Put programs on an otherwise empty PATH, outside a container."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(checks, "CONTAINER_MARKERS", ())

    def put(*names):
        for name in names:
            (tmp_path / name).write_text("#!/bin/sh\n")
            (tmp_path / name).chmod(0o755)

    return put


def test_a_missing_driver_is_reported_with_its_purpose(kernel):
    kernel(None)
    assert checks.driver("libcuda-that-is-not-there.so.1").startswith("none; to use a GPU, install the NVIDIA driver")


@pytest.mark.parametrize(("text", "version"), [(MODULE, "550.54.14"), (OPEN_MODULE, "570.86.10")])
def test_a_container_without_its_gpus_is_distinguished_from_a_missing_driver(text, version, kernel):
    kernel(text)
    line = checks.driver("libcuda-that-is-not-there.so.1")
    assert line == f"{version} in the kernel, but libcuda.so.1 was not found; start the container with --gpus all"


@pytest.mark.parametrize(
    ("built_for", "message"),
    [
        ("12.6", "550.54.14, supports CUDA 12.4, new enough for this torch"),
        ("13.0", "too old: the driver supports CUDA 12.4, this torch was built for 13.0; install driver 580"),
        (None, "550.54.14, supports CUDA 12.4, but this torch is a CPU build; set up with TORCH=cuda"),
    ],
)
def test_the_driver_is_compared_with_the_installed_torch(built_for, message, kernel, library, monkeypatch):
    kernel(MODULE)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    assert checks.driver(library(12040)).startswith(message)
    assert MINIMUM_DRIVERS[13] == "580"


@pytest.mark.parametrize("name", checks.TOOLKIT_COMMANDS)
def test_the_toolkit_is_detected_by_either_of_its_programs(name, on_path, kernel):
    kernel(MODULE)
    on_path(name)
    assert checks.container_toolkit().startswith(f"{name}; compose/gpu-ready checks")


def test_a_missing_toolkit_with_a_driver_is_reported_with_its_package(on_path, kernel):
    kernel(MODULE)
    assert checks.container_toolkit().endswith("install the package nvidia-container-toolkit")


def test_without_a_driver_no_toolkit_is_needed(on_path, kernel):
    kernel(None)
    assert checks.container_toolkit() == "none; not needed without a driver"


def test_inside_a_container_the_toolkit_is_not_checked(on_path, kernel, monkeypatch, tmp_path):
    kernel(MODULE)
    monkeypatch.setattr(checks, "CONTAINER_MARKERS", (tmp_path,))
    assert "run glm doctor on the host" in checks.container_toolkit()


def test_the_toolkit_check_agrees_with_the_check_for_compose(on_path):
    """compose/gpu-ready checks the same programs, and names the same package."""
    script = (REPOSITORY / "compose" / "gpu-ready").read_text()
    assert all(f"command -v {name} " in script for name in checks.TOOLKIT_COMMANDS)
    assert "install the package nvidia-container-toolkit" in script


@pytest.mark.parametrize(
    ("free", "limit", "message"),
    [
        (20 * GB, None, "20.0 GB available"),
        (20 * GB, 32 * GB, "20.0 GB available, cgroup limit 32.0 GB"),
        (3 * GB, None, "3.0 GB available; the 6B model as q4_0 needs 5.1 GB: free memory"),
        (3 * GB, 4 * GB, "3.0 GB available, cgroup limit 4.0 GB; the 6B model as q4_0 needs 5.1 GB: raise the"),
    ],
)
def test_too_little_memory_is_reported_with_the_remedy(free, limit, message, monkeypatch):
    monkeypatch.setattr(checks, "available_memory", lambda: free)
    monkeypatch.setattr(checks, "memory_limit", lambda: limit)
    assert checks.memory().startswith(message)


def test_a_cpu_limit_is_reported_with_the_remedy(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(checks, "available_cpus", lambda: 8)
    assert checks.cpus() == "8"
    monkeypatch.setattr(checks, "available_cpus", lambda: 2)
    assert checks.cpus().startswith("2 of 8, limited by CPU affinity or the cgroup quota; raise it with --cpus or")


@pytest.mark.parametrize(("free", "is_small"), [(64 << 20, True), (2 * GB, False)])
def test_too_little_shared_memory_is_reported_with_the_remedy(free, is_small, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    assert ("--shm-size" in checks.shared_memory()) is is_small


@pytest.mark.parametrize(("free", "is_small"), [(10 * GB, True), (26 * GB, False)])
def test_a_disk_too_small_for_the_6b_is_reported(free, is_small, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    assert ("downloading and converting the 6B model takes 25 GB" in checks.disk(tmp_path)) is is_small


def test_the_size_of_each_mounted_volume_is_reported(monkeypatch, tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "weights").write_bytes(b"0" * 3_000_000)
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "runs" / "mine" / "weights")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=7 * GB))
    assert checks.usage(tmp_path / "runs") == f"3.0 MB in {tmp_path}/runs, 7.0 GB free"
    monkeypatch.setattr(checks, "DATA_FOLDERS", (tmp_path / "absent", tmp_path / "runs", Path("/proc")))
    assert checks.volumes() == [Path("/proc")]  # the only mount
