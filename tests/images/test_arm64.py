"""The code of llama.cpp for Arm, compiled by the script of the images and run under emulation.

`make test-images-full` runs this; it takes two minutes and needs the Debian packages below.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from containers import REPOSITORY

from entrypoints.engines.llamacpp.cpu_features import ALL_VARIANTS
from entrypoints.quantization.gguf_writer import write_gguf

LOCK = REPOSITORY / "images/requirements/infer-quantized.lock"
PACKAGES = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
    "debootstrap": "debootstrap",
}
TOOLCHAIN = """
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
"""
# QEMU's CPU, and what it reports to Linux
EMULATED = {
    None: ("cortex-a72", "fp asimd crc32"),
    "armv8.2_2": ("neoverse-n1", "fp asimd fphp asimdhp asimddp"),
    "armv8.6_1": ("max,sve-max-vq=2", "fp asimd fphp asimdhp asimddp sve i8mm"),
    "armv8.6_2": ("max,sve-max-vq=1", "fp asimd fphp asimdhp asimddp sve i8mm sve2"),
}
PROGRAM = """
import json, sys
from pathlib import Path
cpuinfo, *files = map(Path, sys.argv[1:])
from entrypoints.hardware import resources
if cpuinfo.is_file():
    resources.CPUINFO_FILE = cpuinfo
from entrypoints.engines.llamacpp.cpu_features import load_cpu_code
from entrypoints.engines.llamacpp.engine import LlamaCppEngine
from entrypoints.engines.options import EngineOptions
name, computed = load_cpu_code(), {}
for file in files:
    engine = LlamaCppEngine.load(file, EngineOptions(threads=2))
    first = engine.generate_greedy(list(range(100, 164)), 1, 100)[0]
    computed[file.stem] = {str(id_): logprob for id_, logprob in first.top}
    engine.close()
print(json.dumps([name, computed]))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif("TEST_ARM64" not in os.environ, reason="make test-images-full runs this"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`root`: Debian with Python for Arm; `site`: the packages of infer-quantized, and the compiled code."""
    missing = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    assert not missing, f"apt-get install {' '.join(missing)}"
    folder = tmp_path_factory.mktemp("arm64")
    root, wheels, site = folder / "root", folder / "wheels", folder / "site"
    included = "--include=python3,libgomp1,libstdc++6"
    subprocess.run(
        ["debootstrap", "--arch=arm64", "--foreign", "--variant=minbase", included, "bookworm", root], check=True
    )
    for package in (root / "var/cache/apt/archives").glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", package, root], check=True)
    download(LOCK, wheels)
    for wheel in wheels.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(site)
    compile_for_arm(folder, site / "glm_llamacpp_cpu")
    return folder


def download(lock: Path, wheels: Path) -> None:
    """Download what pip would install on an Arm server: wheels, and source archives where there is no wheel."""
    platforms = [f"--platform=manylinux{version}_aarch64" for version in (2014, "_2_17", "_2_24", "_2_27", "_2_28")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--require-hashes", "--python-version=3.11", *platforms, "--dest", wheels, "-r", lock]
    subprocess.run(command, check=True)


def compile_for_arm(folder: Path, target: Path) -> None:
    """Run the script of the images as if on Arm, with a cross compiler."""
    programs = folder / "programs"
    programs.mkdir()
    for name, line in (("uname", "echo aarch64"), ("g++", 'exec aarch64-linux-gnu-g++ "$@"')):
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    (folder / "toolchain.cmake").write_text(TOOLCHAIN)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "CMAKE_TOOLCHAIN_FILE": str(folder / "toolchain.cmake")}
    subprocess.run([REPOSITORY / "images/scripts/llamacpp", LOCK, target], env=os.environ | environment, check=True)


@pytest.fixture(scope="module")
def models(toy_native: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    files = [tmp_path_factory.mktemp("types") / f"{type_}.gguf" for type_ in ("q8_0", "q4_0")]
    for file in files:
        write_gguf(toy_native, file, file.stem)
    return files


@pytest.fixture(scope="module")
def run(folder: Path, models: list[Path]) -> Callable:
    """The CPU code that is loaded, and the log probabilities of the first tokens for each type."""

    def computed(cpuinfo: Path, interpreter: list[object], *path: Path) -> tuple[str | None, dict]:
        command = [*interpreter, "-c", PROGRAM, cpuinfo, *models]
        search = os.pathsep.join(map(str, [*path, REPOSITORY]))
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": search}, capture_output=True, text=True, check=True
        )
        return tuple(json.loads(done.stdout))

    return computed


def test_each_variant_has_a_library(folder):
    names = {file.stem for file in (folder / "site/glm_llamacpp_cpu").glob("*.so")}
    assert names == {f"libggml-cpu-{name}" for name in ALL_VARIANTS["aarch64"]}


@pytest.mark.parametrize("name", EMULATED)
def test_each_arm_cpu_loads_its_code_and_computes_what_x86_computes(name, folder, run, tmp_path):
    cpu, features = EMULATED[name]
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nFeatures\t: {features}\n")
    emulator = ["qemu-aarch64", "-L", folder / "root", "-cpu", cpu, folder / "root/usr/bin/python3.11"]
    loaded, computed = run(tmp_path / "cpuinfo", emulator, folder / "site")
    _, expected = run(tmp_path / "none", [sys.executable])
    assert loaded == name
    for type_, logprobs in expected.items():
        both = computed[type_].keys() & logprobs.keys()
        assert len(both) > 90  # the last of the 100 most probable tokens are close to each other
        found, wanted = ([each[id_] for id_ in sorted(both)] for each in (computed[type_], logprobs))
        assert found == pytest.approx(wanted, abs=0.05), type_


@pytest.mark.parametrize("name", ["dev", "infer-cpu"])
def test_locked_packages_other_than_torch_have_arm_wheels_or_are_plain_python(name, tmp_path):
    """The wheel of torch is on PyTorch's own index."""
    download(REPOSITORY / f"images/requirements/{name}.lock", tmp_path)
    sources = {file.name.split("-")[0] for file in tmp_path.iterdir() if file.suffix != ".whl"}
    assert sources <= {"deepspeed", "jieba", "rouge_chinese"}
    assert len(list(tmp_path.glob("*aarch64.whl"))) > 15
