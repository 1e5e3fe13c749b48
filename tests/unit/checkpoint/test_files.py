"""Trap names are those of the list of reported pains."""

import json
import os
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from entrypoints.checkpoint.files import refuse_lfs_pointer, require_space, safetensors_header, written_beside
from entrypoints.errors import UserError

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 12345\n"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def weights(tmp_path):
    """A safetensors file of two tensors."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.float16)}, file, metadata={"format": "pt"})
    return file


@pytest.mark.parametrize("name", ["tokenizer.model", "model-00001-of-00007.safetensors"])
def test_an_lfs_pointer_is_told_from_the_file_itself(name, tmp_path):
    """B2."""
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(UserError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        refuse_lfs_pointer(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"version", b"\x00\x01"])
def test_a_file_that_is_no_lfs_pointer_is_let_through(content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    refuse_lfs_pointer(tmp_path / "x")


def test_a_safetensors_header_tells_names_types_and_shapes(weights):
    header = safetensors_header(weights)
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == {
        "a": ("F32", [2, 3]),
        "b": ("F16", [4]),
    }


def header_of(value):
    text = json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 4) + b"no{}",
        struct.pack("<Q", 2) + b"\xff\xfe",
        header_of([]),
        header_of({"a": 1}),
        header_of({"a": {"dtype": "F32", "shape": [1]}}),
        header_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}),
        POINTER.encode(),
    ],
    ids=range(10),
)
def test_a_file_that_is_no_safetensors_is_refused_by_name(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors"):
        safetensors_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("change", [-1, -20, +1])
def test_a_file_of_another_size_than_its_header_says_is_refused_with_both_sizes(change, weights):
    """B2: 24 + 8 bytes of data follow the header."""
    content = weights.read_bytes()
    weights.write_bytes((content + b"x")[: len(content) + change])
    with pytest.raises(UserError, match=f"{len(content) + change} bytes, its header says {len(content)}"):
        safetensors_header(weights)


def test_too_small_a_disk_is_told_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 7, 3_000_000_000))
    require_space(tmp_path / "not" / "made", 3_000_000_000)
    with pytest.raises(UserError, match=r"needs 3\.1 GB and its disk has 3\.0 GB free"):
        require_space(tmp_path / "not" / "made", 3_100_000_000)


def test_the_target_appears_when_the_block_ends_and_nothing_else_stays(tmp_path):
    target = tmp_path / "new" / "out"
    with written_beside(target) as folder:
        (folder / "x").write_text("1")
        assert not target.exists()
    assert (target / "x").read_text() == "1"
    assert names(target.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("overwrite", [False, True])
def test_after_an_error_the_target_is_as_it_was(error, overwrite, tmp_path):
    if overwrite:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "x").write_text("old")
    with pytest.raises(error), written_beside(tmp_path / "out", overwrite) as folder:
        (folder / "x").write_text("half")
        raise error
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == (["old"] if overwrite else [])


def test_a_disk_that_fills_up_is_a_mistake_the_user_can_mend(tmp_path):
    with pytest.raises(UserError, match="No space left on device"), written_beside(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == []


def test_a_disk_without_room_for_a_folder_is_told_as_well(tmp_path, monkeypatch):
    """One of ext4 takes a block for each; a tmpfs none."""

    def full(folder, *_):
        raise FileExistsError if folder.exists() else OSError(28, "No space left on device")

    monkeypatch.setattr(os, "mkdir", full)
    told = r"writing .*out failed: No space left on device; free space"
    with pytest.raises(UserError, match=told), written_beside(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert names(tmp_path) == []


def test_a_target_that_exists_is_left_alone_without_overwrite(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"out exists.*--overwrite"), written_beside(tmp_path / "out"):
        pytest.fail("the block must not run")


def test_overwriting_replaces_the_whole_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    with written_beside(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("2")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["out", "out/new"]


def test_overwriting_a_link_replaces_the_folder_it_points_to(tmp_path):
    """A models folder is often a link to a larger disk."""
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    with written_beside(tmp_path / "out", overwrite=True) as folder:
        assert folder.parent == tmp_path / "disk"
        (folder / "new").write_text("2")
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "disk" / "real") == ["new"]


def test_a_file_is_no_target(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="out is a file"), written_beside(tmp_path / "out", overwrite=True):
        pytest.fail("the block must not run")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in"), written_beside(tmp_path / "file" / "out"):
        pytest.fail("the block must not run")


def test_leftovers_of_killed_runs_go_at_the_next_one(tmp_path):
    """`.partial` stays after a kill while writing, `.old` after one between the two renames of an overwrite."""
    for name in (".out.partial", ".out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "leftover").write_text("")
    (tmp_path / ".out.lock").write_text("")
    with written_beside(tmp_path / "out") as folder:
        assert names(folder) == []
    assert names(tmp_path) == ["out"]


def test_two_processes_never_write_one_target(tmp_path):
    code = (
        "import sys; from pathlib import Path; from entrypoints.checkpoint.files import written_beside\n"
        "with written_beside(Path(sys.argv[1])) as folder: (folder / 'first').touch(); print('in', flush=True); input()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "out"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with first:
        assert first.stdout.readline() == "in\n"
        with pytest.raises(UserError, match="another process is writing"), written_beside(tmp_path / "out"):
            pytest.fail("the block must not run")
        first.communicate("go on\n", timeout=120)
    assert first.returncode == 0
    assert names(tmp_path / "out") == ["first"]


def test_a_target_finished_by_another_while_the_lock_was_awaited_is_left_alone(tmp_path, monkeypatch):
    """The other one finishes between our look at the target and our lock."""
    lock = "entrypoints.checkpoint.files.fcntl.flock"
    monkeypatch.setattr(lock, lambda *_: (tmp_path / "out").mkdir())
    with pytest.raises(UserError, match="out exists"), written_beside(tmp_path / "out"):
        pytest.fail("the block must not run")


def test_a_lock_that_another_took_away_holds_nothing(tmp_path, monkeypatch):
    """The other one ends, and removes the lock file, between our opening it and our locking it."""
    lock = "entrypoints.checkpoint.files.fcntl.flock"
    monkeypatch.setattr(lock, lambda *_: (tmp_path / ".out.lock").unlink())
    with pytest.raises(UserError, match="another process"), written_beside(tmp_path / "out"):
        pytest.fail("the block must not run")
