"""A driver that is too old, simulated by a compiled library that reports a chosen version."""

import shutil
import subprocess

import pytest

from entrypoints.errors import UserError
from entrypoints.hardware.cuda_driver import check_driver


@pytest.fixture
def driver(tmp_path):
    """Compile a library that reports CUDA `version`, in CUDA's encoding."""
    if shutil.which("gcc") is None:
        pytest.skip("compiling a simulated driver library needs gcc")

    def build(version, code=0):
        source = tmp_path / "driver.c"
        source.write_text(f"int cuDriverGetVersion(int *version) {{ *version = {version}; return {code}; }}")
        library = tmp_path / f"libcuda-{version}-{code}.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
        return str(library)

    return build


def test_a_driver_of_an_older_cuda_is_rejected_with_the_version_to_install(driver):
    with pytest.raises(UserError) as caught:
        check_driver(driver(12040), built_for="13.0")
    assert "driver supports CUDA 12.4, this torch was built for 13.0" in str(caught.value)
    assert "580" in str(caught.value)
    assert "TORCH_FLAVOR" in str(caught.value)


@pytest.mark.parametrize("version", [12040, 12060, 13000, 13020])
def test_a_driver_of_the_same_or_a_newer_major_version_passes(driver, version):
    check_driver(driver(version), built_for="12.6")


def test_a_machine_without_a_driver_passes():
    check_driver("libcuda-that-is-not-there.so.1", built_for="13.0")


def test_a_driver_that_reports_no_version_is_left_to_torch(driver):
    check_driver(driver(11000, code=3), built_for="13.0")
