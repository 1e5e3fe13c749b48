"""Builds as an air-gapped site runs them."""

import os
import subprocess

import pytest
from containers import REPOSITORY, VERSION, image_of

SCRIPT = REPOSITORY / "images/scripts/image"


@pytest.fixture
def build(engine, tmp_path):
    """Run the build script on the base image that infer-quantized was built on; what it made is removed again."""
    base = image_of(engine, "infer-quantized").labels["org.opencontainers.image.base.name"]
    environment = {**os.environ, "BASE_IMAGE": base, "IMAGE_PREFIX": "offline-test/"}

    def run(*words, **variables):
        return subprocess.run(
            [SCRIPT, *words], env=environment | variables, capture_output=True, text=True, timeout=540
        )

    yield run
    name = f"offline-test/glm-infer-quantized:{VERSION}"
    if engine.images.list(name):
        engine.images.remove(name, force=True)


@pytest.mark.timeout(900)
def test_a_wheelhouse_is_filled_and_a_build_without_network_takes_all_from_it(build, engine, tmp_path):
    filled = build("infer-quantized", tmp_path / "wheels")
    assert filled.returncode == 0, filled.stderr
    assert list((tmp_path / "wheels").glob("xllamacpp-*.whl"))
    assert list((tmp_path / "wheels/debs/infer-quantized").glob("tini_*.deb"))
    built = build("infer-quantized", OFFLINE="1", WHEELHOUSE=str(tmp_path / "wheels"))
    assert built.returncode == 0, built.stderr
    image = f"offline-test/glm-infer-quantized:{VERSION}"
    assert b"glm JOB" in engine.containers.run(image, ["--help"], remove=True, network_mode="none")


def test_a_build_without_network_from_an_empty_wheelhouse_says_how_to_fill_it(build, tmp_path):
    (tmp_path / "wheels").mkdir()
    failed = build("infer-quantized", OFFLINE="1", WHEELHOUSE=str(tmp_path / "wheels"))
    assert failed.returncode != 0
    assert "make wheelhouse fills it" in failed.stderr or "No matching distribution found" in failed.stderr


def test_a_flavour_without_a_lock_file_says_how_to_make_one(build):
    failed = build("infer-cpu", TORCH_FLAVOUR="cu999")
    assert failed.returncode != 0
    assert "images/requirements/torch-cu999.lock is not there: make lock-cu999" in failed.stderr


def test_an_image_that_is_not_there_is_refused_with_the_list(build):
    failed = build("infer-tpu")
    assert failed.returncode == 1
    assert "images/infer-tpu/Dockerfile is not there" in failed.stderr
    assert "infer-quantized" in failed.stderr
