"""Atomic writes, locks, LFS pointers and safetensors headers."""

import errno
import fcntl
import json
import os
import shutil
import struct
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file

from entrypoints.checkpoint.atomic_files import (
    atomic_file,
    atomic_folder,
    check_not_lfs_pointer,
    exclusive_lock,
    read_safetensors_header,
    require_disk_space,
)
from entrypoints.errors import UserError

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 12345\n"


def file_names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def weights(tmp_path):
    """A safetensors file of two tensors."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.float16)}, file, metadata={"format": "pt"})
    return file


@pytest.mark.parametrize("name", ["tokenizer.model", "model-00001-of-00007.safetensors"])
def test_an_lfs_pointer_is_rejected_with_the_command_that_replaces_it(name, tmp_path):
    """`git clone` without git-lfs leaves such a text in place of every large file."""
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(UserError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        check_not_lfs_pointer(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"version", b"\x00\x01"])
def test_a_file_that_is_not_an_lfs_pointer_passes(content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    check_not_lfs_pointer(tmp_path / "x")


def test_a_safetensors_header_gives_names_types_and_shapes(weights):
    header = read_safetensors_header(weights)
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
def test_a_file_that_is_not_safetensors_is_rejected_by_name(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors"):
        read_safetensors_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("change", [-1, -20, +1])
def test_a_file_whose_size_differs_from_its_header_is_rejected_with_both_sizes(change, weights):
    """As an interrupted copy leaves it; 24 + 8 bytes of data follow the header."""
    content = weights.read_bytes()
    weights.write_bytes((content + b"x")[: len(content) + change])
    with pytest.raises(UserError, match=f"{len(content) + change} bytes, its header specifies {len(content)}"):
        read_safetensors_header(weights)


def test_a_disk_that_is_too_small_is_reported_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 7, 3_000_000_000))
    require_disk_space(tmp_path / "not" / "made", 3_000_000_000)
    with pytest.raises(UserError, match=r"needs 3\.1 GB, its disk has 3\.0 GB free"):
        require_disk_space(tmp_path / "not" / "made", 3_100_000_000)


def test_the_target_appears_when_the_block_ends_and_nothing_else_remains(tmp_path):
    target = tmp_path / "new" / "out"
    with atomic_folder(target) as folder:
        (folder / "x").write_text("1")
        assert not target.exists()
    assert (target / "x").read_text() == "1"
    assert file_names(target.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("overwrite", [False, True])
def test_after_an_error_the_target_is_unchanged(error, overwrite, tmp_path):
    if overwrite:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "x").write_text("old")

    def fail():
        with atomic_folder(tmp_path / "out", overwrite) as folder:
            (folder / "x").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == (["old"] if overwrite else [])


def test_a_disk_that_fills_up_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="No space left on device"), atomic_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert file_names(tmp_path) == []


def test_a_disk_without_space_for_a_folder_is_a_user_error_too(tmp_path, monkeypatch):
    """On ext4 a folder takes a block, on a tmpfs it takes none."""

    def full(folder, *_):
        raise FileExistsError if folder.exists() else OSError(28, "No space left on device")

    monkeypatch.setattr(os, "mkdir", full)
    message = r"writing .*out failed: No space left on device; free space"
    with pytest.raises(UserError, match=message), atomic_folder(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert file_names(tmp_path) == []


def test_an_existing_target_is_not_replaced_without_overwrite(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"out already exists.*--overwrite"), atomic_folder(tmp_path / "out"):
        pytest.fail("the block must not run")


def test_overwriting_replaces_the_whole_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("2")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["out", "out/new"]


def test_overwriting_a_link_replaces_the_folder_it_points_to(tmp_path):
    """A models folder is often a link to a larger disk."""
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        assert folder.parent == tmp_path / "disk"
        (folder / "new").write_text("2")
    assert (tmp_path / "out").is_symlink()
    assert file_names(tmp_path / "disk" / "real") == ["new"]


def test_a_file_is_not_accepted_as_the_target_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="out is a file"), atomic_folder(tmp_path / "out", overwrite=True):
        pytest.fail("the block must not run")


def test_a_location_that_is_not_writable_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in"), atomic_folder(tmp_path / "file" / "out"):
        pytest.fail("the block must not run")


def test_a_file_is_written_atomically_and_never_replaced(tmp_path):
    with atomic_file(tmp_path / "new" / "out") as partial:
        partial.write_text("1")
        assert not (tmp_path / "new" / "out").exists()
    assert file_names(tmp_path / "new") == ["out"]
    with pytest.raises(UserError, match="out already exists"), atomic_file(tmp_path / "new" / "out"):
        pytest.fail("the block must not run")
    with pytest.raises(UserError, match=r"writing .*other failed: No space"), atomic_file(tmp_path / "other"):
        raise OSError(28, "No space left on device")
    assert file_names(tmp_path) == ["new"]


def test_leftovers_of_killed_runs_are_removed_by_the_next_one(tmp_path):
    """`.partial` remains after a kill while writing, `.old` after one between the two renames of an overwrite."""
    for name in (".out.partial", ".out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "leftover").write_text("")
    (tmp_path / ".out.lock").write_text("")
    with atomic_folder(tmp_path / "out") as folder:
        assert file_names(folder) == []
    assert file_names(tmp_path) == ["out"]


def test_two_processes_never_write_one_target(tmp_path):
    code = (
        "import sys; from pathlib import Path; from entrypoints.checkpoint.atomic_files import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as folder:\n"
        " (folder / 'first').touch(); print('writing', flush=True); input()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "out"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with first:
        assert first.stdout.readline() == "writing\n"
        with pytest.raises(UserError, match="another process is writing"), atomic_folder(tmp_path / "out"):
            pytest.fail("the block must not run")
        first.communicate("continue\n", timeout=120)
    assert first.returncode == 0
    assert file_names(tmp_path / "out") == ["first"]


def test_a_target_that_another_process_finished_before_we_got_the_lock_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (tmp_path / "out").mkdir(exist_ok=True))
    with pytest.raises(UserError, match="out already exists"), atomic_folder(tmp_path / "out"):
        pytest.fail("the block must not run")


def test_a_lock_file_that_was_removed_before_we_locked_it_gives_no_lock(tmp_path, monkeypatch):
    """The other process finishes and removes its lock file between our opening and our locking it."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: (tmp_path / ".out.lock").unlink(missing_ok=True))
    with pytest.raises(UserError, match="another process"), atomic_folder(tmp_path / "out"):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_written_with_a_warning(code, tmp_path, monkeypatch, caplog):
    """As some network and FUSE file systems; a marker file in place of the lock would outlive a killed process."""

    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
    with exclusive_lock(tmp_path / "work.lock"):
        pass
    assert (tmp_path / "out" / "x").read_text() == "1"
    assert len([message for message in caplog.messages if "has no locks" in message]) == 2
    assert file_names(tmp_path / "out") == ["x"]


def test_a_waiting_lock_is_held_by_one_process_at_a_time_and_logs_what_it_waits_for(tmp_path, caplog):
    """The holder is killed: what it leaves behind does not block the next one."""
    caplog.set_level("INFO")
    code = (
        "import sys; from pathlib import Path; from entrypoints.checkpoint.atomic_files import exclusive_lock\n"
        "with exclusive_lock(Path(sys.argv[1])): print('locked', flush=True); input()"
    )
    lock = tmp_path / "new" / "work.lock"
    with subprocess.Popen(
        [sys.executable, "-c", code, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "locked\n"
        killer = threading.Timer(0.5, holder.kill)
        killer.start()
        with exclusive_lock(lock, "is preparing the demo"):
            assert holder.wait(60) < 0
        killer.join()
    assert caplog.messages == ["another process is preparing the demo; waiting for it"]


def test_a_lock_that_is_free_is_taken_without_a_log_line(tmp_path, caplog):
    for _ in range(2):
        with exclusive_lock(tmp_path / "work.lock"):
            pass
    assert caplog.messages == []
