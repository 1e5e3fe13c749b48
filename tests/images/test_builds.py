"""Builds without network, and errors of the build script."""

import os
import subprocess

import pytest
from containers import REPOSITORY, VERSION, image_of

SCRIPT = REPOSITORY / "images/scripts/image"


@pytest.fixture
def build(engine, tmp_path):
    """Run the build script on the base image of infer-quantized; the built image is removed at the end."""
    base = image_of(engine, "infer-quantized").labels["org.opencontainers.image.base.name"]
    environment = {**os.environ, "BASE_IMAGE": base, "IMAGE_PREFIX": "offline-test/"}

    def run(*arguments, **variables):
        return subprocess.run(
            [SCRIPT, *arguments], env=environment | variables, capture_output=True, text=True, timeout=540
        )

    yield run
    name = f"offline-test/glm-infer-quantized:{VERSION}"
    if engine.images.list(name):
        engine.images.remove(name, force=True)


@pytest.mark.timeout(900)
def test_a_build_without_network_needs_only_the_wheelhouse(build, engine, tmp_path):
    filled = build("infer-quantized", tmp_path / "wheels")
    assert filled.returncode == 0, filled.stderr
    assert list((tmp_path / "wheels").glob("xllamacpp-*.whl"))
    assert list((tmp_path / "wheels/debs/infer-quantized").glob("tini_*.deb"))
    assert list((tmp_path / "wheels/glm_llamacpp_cpu").glob("libggml-cpu-*.so"))  # no compiler is needed
    built = build("infer-quantized", OFFLINE="1", WHEELHOUSE=str(tmp_path / "wheels"))
    assert built.returncode == 0, built.stderr
    image = f"offline-test/glm-infer-quantized:{VERSION}"
    assert b"usage: glm" in engine.containers.run(image, ["--help"], remove=True, network_mode="none")


def test_an_empty_wheelhouse_is_reported_with_the_command_that_fills_it(build, tmp_path):
    (tmp_path / "wheels").mkdir()
    failed = build("infer-quantized", OFFLINE="1", WHEELHOUSE=str(tmp_path / "wheels"))
    assert failed.returncode != 0
    assert "fill it with make wheelhouse" in failed.stderr or "No matching distribution found" in failed.stderr


def test_a_torch_flavor_without_a_lock_file_is_reported_with_the_command_that_creates_it(build):
    failed = build("infer-cpu", TORCH_FLAVOR="cu999")
    assert failed.returncode != 0
    assert "file not found: images/requirements/torch-cu999.lock; create it with make lock-cu999" in failed.stderr


def test_an_unknown_image_is_rejected_with_the_list_of_images(build):
    failed = build("infer-tpu")
    assert failed.returncode == 1
    assert failed.stderr == "unknown image infer-tpu; images are: infer-quantized infer-cpu infer-cuda train-cuda\n"


@pytest.mark.parametrize("variable", ["PIP_INDEX_URL", "TORCH_INDEX", "LLAMACPP_INDEX", "DEBIAN_MIRROR"])
def test_a_password_in_an_address_is_rejected_because_the_history_would_show_it(variable):
    environment = {**os.environ, variable: "https://user:sesame@mirror.example.com/simple"}
    failed = subprocess.run([SCRIPT, "infer-cpu"], env=environment, capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr == f"{variable} contains a password; put it into a pip.conf and pass PIP_CONF=FILE\n"
