"""Dockerfile, pins and lock files, checked without building (one test needs a Docker engine)."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from containers import DOCKERFILE, IMAGES, REPOSITORY

from entrypoints.engines.llamacpp.cpu_features import ALL_VARIANTS

FOLDER = REPOSITORY / "images"
LOCKS = sorted((FOLDER / "requirements").glob("*.lock"))
PACKAGE = re.compile(r"^([a-z0-9][a-z0-9.-]*)==(\S+)(?: ;[^\\]+)? \\$", re.MULTILINE)


def pins():
    lines = (FOLDER / "pins.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def versions(lock):
    return dict(PACKAGE.findall(lock.read_text()))


def test_the_dockerfile_has_a_target_for_each_of_the_four_images_and_both_readmes_describe_them():
    named = subprocess.run([FOLDER / "scripts/names"], capture_output=True, text=True, check=True).stdout.split()
    assert tuple(sorted(named)) == IMAGES
    contents = (FOLDER / "scripts/contents").read_text()
    assert all(re.search(rf"^  {name}\)$", contents, re.MULTILINE) for name in IMAGES)
    for readme in ("README.md", "README.zh-CN.md"):
        assert all(f"## {name}\n" in (FOLDER / readme).read_text(encoding="utf-8") for name in IMAGES), readme


def test_the_base_image_of_the_dockerfile_is_the_pinned_one():
    text = DOCKERFILE.read_text()
    digest = pins()["BASE_DIGEST"]
    expected = pins()["BASE_IMAGE"] + (f"@{digest}" if digest else "")
    assert re.findall(r"^ARG BASE_IMAGE=(.*)$", text, re.MULTILINE) == [expected]
    stages = set(re.findall(r"^FROM .+ AS (\S+)$", text, re.MULTILINE))
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) - stages == {"scratch", "${BASE_IMAGE}"}
    assert "# syntax=" not in text  # it would fetch another image


def test_hadolint_reports_nothing():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_locked_package_has_hashes():
    assert len(LOCKS) >= 9
    for lock in LOCKS:
        packages = re.findall(r"^[a-z0-9]\S*==", lock.read_text(), re.MULTILINE)
        assert len(packages) == len(PACKAGE.findall(lock.read_text())) >= 1, lock.name


def test_the_images_have_the_versions_that_the_tests_run_with():
    """Except infer-cuda with vLLM, which pins older versions of some packages."""
    tested = versions(FOLDER / "requirements/dev.lock")
    for name in ("infer-cpu", "infer-quantized", "train-cuda", "infer-cuda-cu126"):
        locked = versions(FOLDER / f"requirements/{name}.lock")
        assert len(locked) > 30
        assert {
            package: version for package, version in locked.items() if tested.get(package, version) != version
        } == {}


def test_torch_has_one_version_in_all_flavors():
    assert {versions(lock)["torch"] for lock in LOCKS if lock.name.startswith("torch-")} == {"2.13.0"}


def test_the_quantized_image_has_neither_torch_nor_transformers():
    assert not {"torch", "transformers", "datasets", "gradio"} & set(
        versions(FOLDER / "requirements/infer-quantized.lock")
    )


def test_the_two_lock_files_of_the_vllm_image_have_no_common_package():
    vllm, torch = (versions(FOLDER / f"requirements/{name}.lock") for name in ("infer-cuda-cuda", "torch-cuda"))
    assert "vllm" in vllm
    assert not set(vllm) & set(torch)


def test_the_vllm_image_has_one_version_of_the_cuda_bindings():
    """Below version 13, cuda-python contains the bindings itself, in the files of cuda-bindings, which torch needs."""
    vllm, torch = (versions(FOLDER / f"requirements/{name}.lock") for name in ("infer-cuda-cuda", "torch-cuda"))
    bindings = torch["cuda-bindings"].split(".")[0]
    assert vllm.get("cuda-python", bindings).split(".")[0] == bindings


@pytest.mark.parametrize(("has_headers", "added"), [(True, []), (False, ["python3-dev"])])
def test_the_vllm_image_can_compile_what_triton_compiles(tmp_path, has_headers, added):
    """Triton compiles C code that includes Python.h, which the python of Debian comes without."""
    python = tmp_path / "python3"
    python.write_text(f"#!/bin/sh\necho {tmp_path}\n")
    python.chmod(0o755)
    if has_headers:
        (tmp_path / "Python.h").touch()
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "IMAGE": "infer-cuda"}
    command = f"source {FOLDER}/scripts/contents && echo ${{debian[@]}}"
    done = subprocess.run(["bash", "-euc", command], env=env, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"gcc", "libc6-dev", "libnuma1", "tini", *added}


@pytest.mark.timeout(300)
def test_weights_in_the_repository_are_not_sent_to_the_engine(engine, tmp_path):
    """Otherwise every build would copy gigabytes."""
    models = REPOSITORY / "models"
    existed = models.is_dir()
    models.mkdir(exist_ok=True)
    weights = models / "dummy-of-a-test.safetensors"
    recipe = tmp_path / "Dockerfile"
    recipe.write_text("FROM scratch\nCOPY . /\n")
    try:
        with weights.open("wb") as file:
            file.truncate(1 << 30)
        command = [
            "docker",
            "build",
            "--quiet",
            "--file",
            recipe,
            "--output",
            f"type=local,dest={tmp_path}/context",
            ".",
        ]
        shutil.copy(REPOSITORY / ".dockerignore", f"{recipe}.dockerignore")
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=240)
    finally:
        weights.unlink()
        if not existed:
            models.rmdir()
    files = [file for file in (tmp_path / "context").rglob("*") if file.is_file()]
    assert len(files) > 100
    assert sum(file.stat().st_size for file in files) < 20e6
    tops = {file.relative_to(tmp_path / "context").parts[0] for file in files}
    assert tops == {"README.md", "entrypoints", "images", "pyproject.toml"}


def test_the_script_compiles_the_cpu_code_that_the_engine_selects_from():
    script = (FOLDER / "scripts/llamacpp").read_text()
    compiled = {
        machine: names.split() for machine, names in re.findall(r"^  (\w+)\) variants=\((.+)\) ;;$", script, re.M)
    }
    assert compiled == {machine: list(variants) for machine, variants in ALL_VARIANTS.items()}


def test_compiling_without_a_compiler_is_rejected_with_the_command_that_installs_it(tmp_path):
    for program in ("bash", "dirname", "uname"):
        (tmp_path / program).symlink_to(shutil.which(program))
    command = [FOLDER / "scripts/llamacpp", FOLDER / "requirements/dev.lock", tmp_path / "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "compiling llama.cpp needs g++; apt-get install g++\n"
    assert not (tmp_path / "cpu").exists()
