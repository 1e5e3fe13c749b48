"""What the first job says when the model, the volume or the disk is not as it should be."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compose import Project

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def volume(make_project: Callable[..., Project], tmp_path: Path) -> Iterator[Callable[[int], str]]:
    """A folder on a file system of so many megabytes, which a container then has as its /models."""
    if os.getuid():
        pytest.skip("only root may mount a small file system")
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


def prepare(project: Project, folder: str, *words: str) -> subprocess.CompletedProcess:
    """Run the first job with another folder as its store."""
    return project.compose(
        "run", "--rm", "--no-deps", "--volume", f"{folder}:/store", "model-init", *words, check=False
    )


def one_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("glm: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def test_a_model_that_is_nowhere_is_named(make_project):
    done = make_project(MODEL="absent").compose("run", "--rm", "--no-deps", "model-init", check=False)
    assert "no model 'absent': it is no folder, nor one in /folders, nor one in /outputs" in one_line(done)


def test_a_volume_that_cannot_be_written_is_named_with_the_user(make_project, tmp_path):
    tmp_path.chmod(0o755)
    line = one_line(prepare(make_project(), str(tmp_path), "prepare", "demo", "/store"))
    assert "cannot write in /store (Permission denied)" in line
    assert "must be writable for user 10001 or group 0" in line


def test_a_folder_of_models_that_cannot_be_read_is_named_with_the_user(make_project, tmp_path):
    tmp_path.chmod(0o700)
    done = make_project(MODEL="mine", FOLDERS_DIR=tmp_path).compose(
        "run", "--rm", "--no-deps", "model-init", check=False
    )
    assert "/folders cannot be read (Permission denied); let user 10001 or group 0 read it" in one_line(done)


def test_a_disk_too_small_for_the_demo_is_told_before_it_is_made(make_project, volume):
    folder = volume(20)
    line = one_line(prepare(make_project(), folder, "prepare", "demo", "/store"))
    assert "its disk has 0.0 GB free; free space or choose another disk" in line
    assert [entry.name for entry in Path(folder).iterdir() if not entry.name.startswith(".")] == []


def test_a_disk_that_fills_up_leaves_nothing_half_made_and_a_restart_goes_on(make_project, volume, small_models):
    """4 MB hold neither the checkpoint of 7 MB nor, beside it, the file made of it."""
    project = make_project(FOLDERS_DIR=small_models)
    words = ("prepare", "toy", "/store", "--look-in", "/folders", "--quantize", "f16")
    size = sum(file.stat().st_size for file in (small_models / "toy").iterdir()) // 1_000_000 + 1
    for megabytes in (4, size + 2):
        folder = volume(megabytes)
        assert "GB free; free space" in one_line(prepare(project, folder, *words))
        assert not [entry.name for entry in Path(folder).iterdir() if entry.suffix in (".partial", ".gguf")]
    subprocess.run(["mount", "-o", "remount,size=200m", folder], check=True)
    done = prepare(project, folder, *words)
    assert done.stdout.split() == ["/store/toy", "/store/toy-f16.gguf"], done.stderr
    assert "/store/toy is there" in done.stderr
