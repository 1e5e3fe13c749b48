"""A driver that is too old, played by a library of the driver's name that answers with a version of ours (trap J1)."""

import shutil
import subprocess

import pytest

from entrypoints.engines.driver import check_driver
from entrypoints.errors import UserError


@pytest.fixture
def driver(tmp_path):
    """Make a library that says it is the driver for CUDA `version`, counted as CUDA does."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to make a stand-in for the driver's library with")

    def make(version, code=0):
        source = tmp_path / "driver.c"
        source.write_text(f"int cuDriverGetVersion(int *version) {{ *version = {version}; return {code}; }}")
        library = tmp_path / f"libcuda-{version}-{code}.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
        return str(library)

    return make


def test_a_driver_of_an_older_cuda_is_refused_with_the_version_to_install(driver):
    with pytest.raises(UserError) as refused:
        check_driver(driver(12040), built_for="13.0")
    assert "driver is for CUDA 12.4, this torch was built for 13.0" in str(refused.value)
    assert "580" in str(refused.value)
    assert "TORCH_FLAVOUR" in str(refused.value)


@pytest.mark.parametrize("version", [12040, 12060, 13000, 13020])
def test_a_driver_of_the_same_or_a_newer_major_version_will_do(driver, version):
    check_driver(driver(version), built_for="12.6")


def test_without_a_driver_nothing_is_refused():
    check_driver("libcuda-that-is-not-there.so.1", built_for="13.0")


def test_a_driver_that_does_not_answer_is_left_to_torch(driver):
    check_driver(driver(11000, code=3), built_for="13.0")
