"""The import name `entrypoints` also belongs to another package on PyPI, a single module: no conflict is silent."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import entrypoints

PACKAGE = Path(entrypoints.__file__).parent
OTHER = "class EntryPoint: pass\ndef get_group_all(group): return []\n"


@pytest.fixture
def site(tmp_path):
    """A folder of installed packages with the other package, and the `glm` command's launcher."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "entrypoints.py").write_text(OTHER)
    (folder / "glm_entrypoints").symlink_to(PACKAGE / "launcher")
    return folder


def run(site, tmp_path, *words):
    env = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)


GLM = ("-c", "import sys; from glm_entrypoints import main; sys.exit(main())", "--help")
OTHER_IN_USE = ("-c", "import entrypoints; entrypoints.get_group_all('x')")


def test_in_a_regular_install_this_package_is_imported_and_users_of_the_other_one_get_the_reason(site, tmp_path):
    """Of one folder Python prefers a package to a module of the same name."""
    (site / "entrypoints").symlink_to(PACKAGE)
    glm = run(site, tmp_path, *GLM)
    assert glm.returncode == 0, glm.stderr
    assert glm.stdout.startswith("usage: glm")
    assert run(site, tmp_path, "-m", "entrypoints", "--help").stdout == glm.stdout
    other = run(site, tmp_path, *OTHER_IN_USE)
    assert other.returncode == 1
    assert "is hidden by glm-entrypoints; install them in separate environments" in other.stderr


def test_where_the_other_package_is_found_first_the_command_names_it_and_the_remedy(site, tmp_path):
    """As in an editable install, whose finder comes after the folder of installed packages."""
    assert run(site, tmp_path, *OTHER_IN_USE).returncode == 0
    glm = run(site, tmp_path, *GLM)
    assert (glm.returncode, glm.stdout) == (1, "")
    assert glm.stderr == (
        f"glm: {site / 'entrypoints.py'} hides the package of this command, which has the same name; "
        "run `pip uninstall entrypoints`, or install glm-entrypoints in its own environment\n"
    )


def test_where_the_other_package_is_found_first_its_module_path_fails_loudly(site, tmp_path):
    """`python -m entrypoints` runs the other module, which prints nothing; `-m entrypoints.__main__` is an error."""
    assert run(site, tmp_path, "-m", "entrypoints", "--help").stdout == ""
    module = run(site, tmp_path, "-m", "entrypoints.__main__", "--help")
    assert module.returncode != 0
    assert "entrypoints" in module.stderr


def test_every_package_is_installed():
    """An editable install finds packages that a wheel, and so an image, would lack."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["tool"]["setuptools"]["packages"]
    folders = {file.parent.relative_to(PACKAGE.parent) for file in PACKAGE.rglob("__init__.py")}
    found = {".".join(folder.parts) for folder in folders} - {"entrypoints.launcher"}
    assert sorted(listed) == sorted([*found, "glm_entrypoints"])
