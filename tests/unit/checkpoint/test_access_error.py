"""Which file or folder keeps this process from a path, in the message for an OSError that names it."""

import contextlib
import os
from pathlib import Path

import pytest
from permissions import denied

from entrypoints.checkpoint.atomic_files import access_error, atomic_file, atomic_folder
from entrypoints.errors import UserError

USER, GROUP = f"user {os.getuid()}, group {os.getgid()}", os.getgid()


@contextlib.contextmanager
def unwritable(folder: Path):
    """Like `denied`, but the folder can still be read and entered."""
    with denied(folder):
        folder.chmod(0o555)
        yield


def error_of(action) -> UserError:
    with pytest.raises(PermissionError) as caught:
        action()
    return access_error(caught.value)


def test_an_unreadable_file_gets_the_mode_with_which_it_can_be_read(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with denied(file):
        error = error_of(file.read_text)
    assert error.problem == f"cannot read {file} (Permission denied)"
    assert error.remedy == f"make it readable for {USER}: chgrp {GROUP} {file} && chmod 640 {file}"


@pytest.mark.parametrize("link", [False, True])
def test_the_remedy_names_the_folder_that_cannot_be_entered(link, tmp_path):
    """Also where a link leads, as in the cache of a hub: a mode of the link itself would not help."""
    folder, file = tmp_path / "closed", tmp_path / "closed" / "inner" / "file"
    file.parent.mkdir(parents=True)
    file.touch()
    (tmp_path / "link").symlink_to(file)
    with denied(folder):
        error = error_of((tmp_path / "link" if link else file).read_text)
    assert error.problem == f"cannot read {tmp_path / 'link' if link else file} (Permission denied)"
    assert error.remedy == f"make {folder} accessible for {USER}: chgrp {GROUP} {folder} && chmod g+rx {folder}"


def test_the_remedy_names_a_folder_that_cannot_be_listed(tmp_path):
    with denied(tmp_path):
        error = error_of(lambda: list(tmp_path.iterdir()))
    assert f"make {tmp_path} accessible" in error.remedy


@pytest.mark.parametrize("exists", [True, False])
def test_a_file_that_cannot_be_written_is_not_called_unreadable(exists, tmp_path):
    file = tmp_path / "scores.json"
    if exists:
        file.touch()
    with unwritable(tmp_path), denied(file) if exists else contextlib.nullcontext():
        if exists:
            file.chmod(0o444)
        error = error_of(lambda: file.write_text("x"))
    assert error.problem == f"cannot write {file} (Permission denied)"
    closed = file if exists else tmp_path
    assert error.remedy == f"make {closed} writable for {USER}, or choose another path"


def test_another_error_is_printed_with_its_reason():
    with pytest.raises(OSError, match="too long") as caught:
        Path("x" * 300).stat()
    assert (
        str(access_error(caught.value))
        == f"cannot use {'x' * 300} (File name too long); check the path; --debug shows where"
    )


@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_a_source_is_named_while_a_target_is_written(atomic, tmp_path):
    source = tmp_path / "source"
    source.touch()
    expected = rf"cannot read {source} .*; make it readable"
    with denied(source), pytest.raises(UserError, match=expected), atomic(tmp_path / "target"):
        source.read_bytes()
    assert list(tmp_path.iterdir()) == [source]


def test_a_target_that_cannot_be_written_is_still_named(tmp_path):
    def write() -> None:
        with atomic_folder(tmp_path / "target") as partial, denied(partial):
            (partial / "file").write_text("x")

    with pytest.raises(UserError, match=rf"writing {tmp_path}/target failed: Permission denied"):
        write()
