"""Errors of model-init about the model, the volume or the disk."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compose import Project

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def volume(make_project: Callable[..., Project], tmp_path: Path) -> Iterator[Callable[[int], str]]:
    """Create a file system of the given size in megabytes, which a container gets as its model store."""
    if os.getuid():
        pytest.skip("mounting a file system needs root")
    mounted = []

    def make(megabytes: int) -> str:
        folder = tmp_path / f"small-{megabytes}"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0777", "none", folder], check=True)
        mounted.append(folder)
        return str(folder)

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def prepare(project: Project, folder: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run model-init with another folder as its store."""
    return project.compose(
        "run", "--rm", "--no-deps", "--volume", f"{folder}:/store", "model-init", *arguments, check=False
    )


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The only error line of a failed command."""
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("glm: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def test_an_unknown_model_is_reported(make_project):
    done = make_project(MODEL="absent").compose("run", "--rm", "--no-deps", "model-init", check=False)
    expected = "model 'absent' not found: it is not a folder, nor is it in /folders, nor is it in /outputs"
    assert expected in error_line(done)


def test_a_volume_without_write_permission_is_reported_with_the_user(make_project, tmp_path):
    tmp_path.chmod(0o755)
    line = error_line(prepare(make_project(), str(tmp_path), "prepare", "demo", "/store"))
    assert "cannot write in /store (Permission denied)" in line
    assert "must be writable for user 10001 or group 0" in line


def test_a_model_folder_without_read_permission_is_reported_with_the_user(make_project, tmp_path):
    tmp_path.chmod(0o700)
    done = make_project(MODEL="mine", FOLDERS_DIR=tmp_path).compose(
        "run", "--rm", "--no-deps", "model-init", check=False
    )
    assert "/folders cannot be read (Permission denied); make it readable for user 10001 or group 0" in error_line(done)


def test_a_disk_that_is_too_small_for_the_demo_model_is_reported_before_it_is_created(make_project, volume):
    folder = volume(20)
    line = error_line(prepare(make_project(), folder, "prepare", "demo", "/store"))
    assert "free; free space or choose another disk" in line
    assert [entry.name for entry in Path(folder).iterdir() if not entry.name.startswith(".")] == []


def test_a_full_disk_leaves_no_partial_file_and_a_restart_continues(make_project, volume, small_models):
    """4 MB are too small for the checkpoint of 7 MB, and its size alone is too small for the GGUF file too."""
    project = make_project(FOLDERS_DIR=small_models)
    arguments = ("prepare", "tiny", "/store", "--look-in", "/folders", "--quantize", "f16")
    size = sum(file.stat().st_size for file in (small_models / "tiny").iterdir()) // 1_000_000 + 1
    for megabytes in (4, size + 2):
        folder = volume(megabytes)
        assert "free; free space" in error_line(prepare(project, folder, *arguments))
        assert not [entry.name for entry in Path(folder).iterdir() if entry.suffix in (".partial", ".gguf")]
    subprocess.run(["mount", "-o", "remount,size=200m", folder], check=True)
    done = prepare(project, folder, *arguments)
    assert done.stdout.split() == ["/store/tiny", "/store/tiny-f16.gguf"], done.stderr
    assert "/store/tiny exists" in done.stderr
