"""`make sbom`: the list of packages of an image is complete."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from containers import REPOSITORY, VERSION, image_of

SYFT = Path(sys.executable).with_name("syft")
LOCK = REPOSITORY / "images" / "requirements" / "infer-quantized.lock"


@pytest.mark.timeout(600)
def test_the_bill_of_materials_lists_every_locked_package_and_the_debian_packages(engine):
    """Of the smallest image; the same script writes the others."""
    image_of(engine, "infer-quantized")
    file = REPOSITORY / "sbom" / "infer-quantized.json"
    file.unlink(missing_ok=True)
    done = subprocess.run(
        [REPOSITORY / "images/scripts/sbom", SYFT, "infer-quantized"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "sbom/infer-quantized.json\n"
    components = json.loads(file.read_text(encoding="utf-8"))["components"]
    found = {(part["purl"].partition("@")[0], part.get("version")) for part in components if "purl" in part}
    python = {(name.removeprefix("pkg:pypi/"), version) for name, version in found if name.startswith("pkg:pypi/")}
    assert set(re.findall(r"^(\S+)==(\S+)", LOCK.read_text(), re.MULTILINE)) - python == set()
    assert len([name for name, _ in found if name.startswith("pkg:deb/")]) > 80


def test_an_image_that_is_not_built_is_named():
    command = [REPOSITORY / "images/scripts/sbom", "false", "no-such-image"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == f"glm-no-such-image:{VERSION} is not built: run make image/no-such-image\n"
