"""The GPUs of a machine, simulated by a compiled NVML that describes chosen ones, and by one that lacks a part."""

import shutil
import subprocess

import pytest
import torch

from entrypoints.hardware.gpus import Gpu, list_gpus

GB = 10**9
CARDS = (("NVIDIA H100", 80 * GB, 79 * GB, (9, 0)), ("Tesla T4", 16 * GB, 15 * GB, (7, 5)))
FOUND = [Gpu(*card) for card in CARDS]
LIBRARY = """
#include <stdio.h>
#include <string.h>
static const char *NAMES[] = {{{names}}};
static const unsigned long long TOTAL[] = {{{total}}}, FREE[] = {{{free}}};
static const int MAJOR[] = {{{major}}}, MINOR[] = {{{minor}}};
int nvmlInit_v2(void) {{ return {init}; }}
int nvmlShutdown(void) {{ return 0; }}
int nvmlDeviceGetCount_v2(unsigned *count) {{ *count = {count}; return 0; }}
int nvmlDeviceGetHandleByIndex_v2(unsigned number, void **handle) {{ *handle = (void *)(long)(number + 1); return 0; }}
#define NUMBER ((long)handle - 1)
int nvmlDeviceGetUUID(void *handle, char *text, unsigned size) {{
    snprintf(text, size, "GPU-%c0000000-0000", 'a' + (int)NUMBER);
    return 0;
}}
int nvmlDeviceGetName(void *handle, char *text, unsigned size) {{ strncpy(text, NAMES[NUMBER], size); return 0; }}
int nvmlDeviceGetMigMode(void *handle, unsigned *now, unsigned *later) {{ *now = *later = {mig}; return {mig_code}; }}
int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *memory) {{
    memory[0] = TOTAL[NUMBER]; memory[1] = FREE[NUMBER]; memory[2] = TOTAL[NUMBER] - FREE[NUMBER];
    return 0;
}}
{capability}
"""
CAPABILITY = """
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    *major = MAJOR[NUMBER]; *minor = MINOR[NUMBER];
    return 0;
}
"""


@pytest.fixture
def nvml(tmp_path):
    """Compile an NVML that describes CARDS; the fields change how it answers."""
    if shutil.which("gcc") is None:
        pytest.skip("compiling a simulated driver library needs gcc")

    def build(**fields):
        names, total, free, capabilities = zip(*CARDS, strict=True)
        values = {
            "names": ", ".join(f'"{name}"' for name in names),
            "total": ", ".join(map(str, total)),
            "free": ", ".join(map(str, free)),
            "major": ", ".join(str(major) for major, _ in capabilities),
            "minor": ", ".join(str(minor) for _, minor in capabilities),
            "count": len(CARDS), "init": 0, "mig": 0, "mig_code": 3, "capability": CAPABILITY,
        }  # fmt: skip
        source, library = tmp_path / "nvml.c", tmp_path / "libnvidia-ml.so.1"
        source.write_text(LIBRARY.format(**values | fields))
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
        return str(library)

    return build


@pytest.fixture
def asked(monkeypatch):
    """A CUDA build of torch with one GPU; the numbers of the GPUs whose memory CUDA was asked about."""
    numbers = []

    def mem_get_info(number):
        numbers.append(number)
        return 3 * GB, 4 * GB

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "asked")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (8, 6))
    return numbers


@pytest.mark.parametrize(
    ("visible", "numbers"),
    [
        (None, [0, 1]), ("", []), ("1", [1]), ("1,0", [1, 0]), ("0, 1", [0, 1]), ("0,5,1", [0]), ("-1", []),
        ("GPU-b0", [1]), ("GPU-b0000000-0000,GPU-a", [1, 0]), ("GPU-", []), ("GPU-c", []),
    ],
)  # fmt: skip
def test_the_gpus_are_those_of_cuda_visible_devices_in_its_order(visible, numbers, nvml, asked):
    """CUDA ends the list at the first one that does not exist (CUDA C++ Programming Guide, environment variables)."""
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert list_gpus(nvml(), env | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) == [FOUND[number] for number in numbers]
    assert not asked


@pytest.mark.parametrize(
    ("fields", "env"),
    [
        ({"init": 9}, {}),  # NVML_ERROR_DRIVER_NOT_LOADED
        ({"mig": 1, "mig_code": 0}, {}),
        ({}, {"CUDA_VISIBLE_DEVICES": "MIG-12345678"}),
        ({"capability": ""}, {}),
        ({}, {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}),
        ({}, {"CUDA_DEVICE_ORDER": ""}),
    ],
    ids=["no driver", "MIG", "named instance", "older library", "another order", "CUDA's order, different cards"],
)
def test_cuda_is_asked_where_nvml_cannot_answer(fields, env, nvml, asked):
    by_bus = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert list_gpus(nvml(**fields), by_bus | env) == [Gpu("asked", 4 * GB, 3 * GB, (8, 6))]
    assert asked == [0]


def test_equal_cards_are_read_from_nvml_whatever_the_order(nvml, asked):
    found = list_gpus(nvml(names='"A100", "A100"'), {})
    assert [gpu.name for gpu in found] == ["A100", "A100"]
    assert not asked


def test_cuda_is_asked_on_a_machine_without_nvml(asked):
    assert [gpu.name for gpu in list_gpus("libnvidia-ml-that-is-not-there.so.1", {})] == ["asked"]


def test_a_build_without_cuda_has_no_gpus_whatever_nvml_says(nvml):
    assert not torch.cuda.is_available()
    assert list_gpus(nvml(), {}) == []


def test_only_ampere_and_newer_compute_in_bfloat16():
    """V100 7.0, T4 7.5, A100 8.0, RTX 4090 8.9, H100 9.0."""
    capabilities = [(7, 0), (7, 5), (8, 0), (8, 9), (9, 0)]
    assert [Gpu("", 0, 0, found).has_bf16 for found in capabilities] == [False, False, True, True, True]
