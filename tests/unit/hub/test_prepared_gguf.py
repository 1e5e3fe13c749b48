"""The GGUF file that `glm prepare` makes of a folder of the store: verified, and replaced when the folder changed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from entrypoints.checkpoint.gguf_reader import open_gguf
from entrypoints.checkpoint.manifest import record_path, write_file_record, write_manifest
from entrypoints.checkpoint.native import open_native
from entrypoints.errors import UserError
from entrypoints.hub import model_store
from entrypoints.hub.model_store import PrepareOptions
from entrypoints.quantization.gguf_writer import write_gguf
from entrypoints.settings import Settings


@pytest.fixture
def run(toy_native, tmp_path) -> Path:
    """The folder of a training run."""
    return shutil.copytree(toy_native, tmp_path / "mine")


@pytest.fixture
def prepare(run, tmp_path):
    """Prepare the run in tmp_path/store; returns its folder there."""
    return lambda: model_store.prepare_model(tmp_path / "store", str(run), PrepareOptions(Settings(), None, None))


def prepare_q4_0(folder: Path, validate: Callable[[Path], object] = lambda _: None) -> Path:
    """Its q4_0 file. That `glm prepare` validates the file is tested in unit/jobs/test_prepare.py."""

    def quantize(folder: Path, file: Path, type_: str, finished: Callable[[Path], object]) -> None:
        write_gguf(folder, file, type_, check=lambda partial: (validate(partial), finished(partial)))

    return model_store.prepare_gguf(folder, "q4_0", quantize)


def train_again(run: Path) -> None:
    """Change the run as training it again does."""
    (run / "prompt.json").write_text('{"template": "chatglm3", "source_prefix": "写广告："}', encoding="utf-8")
    write_manifest(run, {"made_by": "glm train"})


def test_a_run_that_was_repeated_replaces_its_copy_and_the_gguf_file(prepare, run):
    folder = prepare()
    file = prepare_q4_0(folder)
    first = file.read_bytes()
    train_again(run)
    assert prepare() == folder
    assert open_native(folder, verify=True).prompt_format.source_prefix == "写广告："
    assert prepare_q4_0(folder).read_bytes() != first
    assert open_gguf(file).prompt_format.source_prefix == "写广告："
    assert prepare_q4_0(folder) == file  # matches its new record
    left = [entry.name for entry in file.parent.iterdir() if "gguf" in entry.name and "lock" not in entry.name]
    assert sorted(left) == ["mine-q4_0.gguf", "mine-q4_0.gguf.json"]


@pytest.mark.parametrize("failure", ["full disk", "too large divergence", "interrupt"])
def test_the_former_gguf_file_stays_when_its_successor_cannot_be_made(failure, prepare, run, monkeypatch):
    """The API that serves it may restart at any time."""
    file = prepare_q4_0(prepare())
    former = (file.read_bytes(), record_path(file).read_bytes())
    train_again(run)
    folder = prepare()

    def fail(_: Path) -> None:
        raise KeyboardInterrupt if failure == "interrupt" else UserError("it differs too much", "choose another type")

    if failure == "full disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(KeyboardInterrupt if failure == "interrupt" else UserError):
        prepare_q4_0(folder, fail)
    assert (file.read_bytes(), record_path(file).read_bytes()) == former
    monkeypatch.undo()
    assert prepare_q4_0(folder).read_bytes() != former[0]


def test_a_kill_between_the_new_file_and_its_record_is_repaired_by_the_next_run(prepare, run):
    file = prepare_q4_0(prepare())
    older = record_path(file).read_bytes()
    train_again(run)
    newer = prepare_q4_0(prepare()).read_bytes()
    record_path(file).write_bytes(older)  # the file is replaced first
    assert prepare_q4_0(prepare()) == file
    assert file.read_bytes() == newer
    assert record_path(file).read_bytes() != older


def test_a_damaged_gguf_file_is_rejected(prepare):
    file = prepare_q4_0(prepare())
    assert file.name == "mine-q4_0.gguf"
    assert prepare_q4_0(prepare()) == file
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"mine-q4_0\.gguf does not match its SHA-256; copy it again, or move"):
        prepare_q4_0(prepare())


def test_a_gguf_file_without_a_record_is_rejected(prepare):
    file = prepare_q4_0(prepare())
    record_path(file).unlink()
    with pytest.raises(UserError, match=r"mine-q4_0\.gguf\.json is missing"):
        prepare_q4_0(prepare())


def test_a_gguf_file_of_another_command_is_not_replaced(prepare):
    """With an adapter, `glm quantize` records no checkpoint that alone would give the same file."""
    folder = prepare()
    file = folder.with_name("mine-q4_0.gguf")
    file.write_bytes(b"mine")
    write_file_record(file, file)
    with pytest.raises(UserError, match=r"mine-q4_0\.gguf was created by another command; move it elsewhere"):
        prepare_q4_0(folder)
    assert file.read_bytes() == b"mine"
