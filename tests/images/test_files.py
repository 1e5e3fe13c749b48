"""What the files of the images promise, read without an engine."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from containers import IMAGES, REPOSITORY

FOLDER = REPOSITORY / "images"
LOCKS = sorted((FOLDER / "requirements").glob("*.lock"))
PACKAGE = re.compile(r"^([a-z0-9][a-z0-9.-]*)==(\S+)(?: ;[^\\]+)? \\$", re.MULTILINE)


def pins():
    lines = (FOLDER / "pins.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def versions(lock):
    return dict(PACKAGE.findall(lock.read_text()))


def test_there_are_four_images_each_with_a_readme():
    assert tuple(sorted(file.parent.name for file in FOLDER.glob("*/Dockerfile"))) == IMAGES
    assert all((FOLDER / name / "README.md").is_file() for name in IMAGES)


@pytest.mark.parametrize("name", IMAGES)
def test_the_base_image_of_a_dockerfile_is_the_pinned_one(name):
    text = (FOLDER / name / "Dockerfile").read_text()
    digest = pins()["BASE_DIGEST"]
    expected = pins()["BASE_IMAGE"] + (f"@{digest}" if digest else "")
    assert re.findall(r"^ARG BASE_IMAGE=(.*)$", text, re.MULTILINE) == [expected]
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"scratch", "${BASE_IMAGE}", "packages"}


@pytest.mark.parametrize("name", IMAGES)
def test_the_linter_finds_nothing_in_a_dockerfile(name):
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, FOLDER / name / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_package_of_every_lock_has_hashes():
    assert len(LOCKS) >= 9
    for lock in LOCKS:
        named = re.findall(r"^[a-z0-9]\S*==", lock.read_text(), re.MULTILINE)
        assert len(named) == len(PACKAGE.findall(lock.read_text())) >= 1, lock.name


def test_the_images_have_the_versions_that_the_tests_run_with():
    """vLLM pins older ones of some packages, so its images stand apart."""
    tested = versions(FOLDER / "requirements/dev.lock")
    for name in ("infer-cpu", "infer-quantized", "train-cuda", "infer-cuda-cu126"):
        here = versions(FOLDER / f"requirements/{name}.lock")
        assert len(here) > 30
        assert {package: version for package, version in here.items() if tested.get(package, version) != version} == {}


def test_torch_has_one_version_in_all_flavours():
    assert {versions(lock)["torch"] for lock in LOCKS if lock.name.startswith("torch-")} == {"2.13.0"}


def test_the_quantized_image_has_neither_torch_nor_transformers():
    assert not {"torch", "transformers", "datasets", "gradio"} & set(
        versions(FOLDER / "requirements/infer-quantized.lock")
    )


def test_no_package_stands_in_both_locks_of_the_vllm_image():
    ours, torch = (versions(FOLDER / f"requirements/{name}.lock") for name in ("infer-cuda-cuda", "torch-cuda"))
    assert "vllm" in ours
    assert not set(ours) & set(torch)


@pytest.mark.timeout(300)
def test_a_gigabyte_of_weights_stays_out_of_the_build_context(engine, tmp_path):
    """J7."""
    models = REPOSITORY / "models"
    existed = models.is_dir()
    models.mkdir(exist_ok=True)
    dummy = models / "dummy-of-a-test.safetensors"
    recipe = tmp_path / "Dockerfile"
    recipe.write_text("FROM scratch\nCOPY . /\n")
    try:
        with dummy.open("wb") as file:
            file.truncate(1 << 30)
        words = ["docker", "build", "--quiet", "--file", recipe, "--output", f"type=local,dest={tmp_path}/context", "."]
        shutil.copy(REPOSITORY / ".dockerignore", f"{recipe}.dockerignore")
        subprocess.run(words, cwd=REPOSITORY, check=True, capture_output=True, timeout=240)
    finally:
        dummy.unlink()
        if not existed:
            models.rmdir()
    files = [file for file in (tmp_path / "context").rglob("*") if file.is_file()]
    assert len(files) > 100
    assert sum(file.stat().st_size for file in files) < 20e6
    tops = {file.relative_to(tmp_path / "context").parts[0] for file in files}
    assert tops == {"README.md", "entrypoints", "images", "pyproject.toml"}


@pytest.mark.parametrize("cpu", ["native AVX512", "-march=native", "AVX512;rm"])
def test_a_processor_to_compile_for_that_cannot_be_is_refused_before_anything_is_fetched(cpu, tmp_path):
    words = [FOLDER / "scripts/llamacpp", "install", FOLDER / "requirements/dev.lock", sys.executable, cpu]
    done = subprocess.run(words, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"LLAMACPP_CPU={cpu}: expected native, or switches such as AVX512 AVX512_VNNI\n"
    assert list(tmp_path.iterdir()) == []
