"""`glm verify`: folders with a manifest, GGUF files with a record, and waiting for a model."""

import hashlib
import json
import re
import shutil
import threading
from pathlib import Path

import pytest


@pytest.fixture
def folder(toy_native, tmp_path):
    return shutil.copytree(toy_native, tmp_path / "native")


def test_the_number_of_verified_files_is_printed(folder, glm):
    files = len(list(folder.iterdir())) - 1  # the manifest does not list itself
    assert files >= 8
    assert glm("verify", folder).out == f"{folder}: {files} files match the manifest\n"


def test_one_changed_byte_in_the_weights_is_found(folder, glm):
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "model.safetensors does not match its SHA-256" in glm("verify", folder).mistake()


def test_every_wrong_file_is_named_in_one_message(folder, glm):
    (folder / "tokenizer.json").unlink()
    (folder / "config.json").write_text("{}")
    message = glm("verify", folder).mistake()
    assert "tokenizer.json is missing" in message
    assert "config.json has 2 bytes" in message


@pytest.mark.parametrize(
    "manifest", [None, "", "[]", '{"provenance": {}}'], ids=["missing", "empty", "array", "incomplete"]
)
def test_a_folder_without_a_valid_manifest_is_rejected(manifest, folder, glm):
    (folder / "manifest.json").unlink()
    if manifest is not None:
        (folder / "manifest.json").write_text(manifest)
    assert "manifest.json" in glm("verify", folder).mistake()


def test_a_missing_folder_is_a_user_error(tmp_path, glm):
    glm("verify", tmp_path / "nowhere").mistake()


@pytest.fixture
def gguf(toy_gguf, tmp_path):
    """A file with its record, as in a model store."""
    file = Path(shutil.copy(toy_gguf, tmp_path))
    fields = {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    file.with_name(f"{file.name}.json").write_text(json.dumps(fields))
    return file


def test_a_gguf_file_is_compared_with_its_record(gguf, glm):
    assert glm("verify", gguf).out == f"{gguf}: matches its SHA-256\n"
    with gguf.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"x")
    changed = glm("verify", gguf).mistake()
    gguf.with_name(f"{gguf.name}.json").write_text("[")
    damaged = glm("verify", gguf).mistake()
    gguf.with_name(f"{gguf.name}.json").unlink()
    missing = glm("verify", gguf).mistake()
    assert "does not match its SHA-256" in changed
    assert "toy.gguf.json is missing" in missing
    for message in (changed, damaged, missing):
        assert "move " in message
        assert not re.search("remove|delete", message), "the file may be good"


def test_it_waits_for_a_model_that_is_being_prepared(folder, tmp_path, glm):
    threading.Timer(1, folder.rename, [tmp_path / "later"]).start()
    assert glm("verify", tmp_path / "later", "--wait-seconds", 60).out.startswith(f"{tmp_path / 'later'}: ")


def test_the_wait_is_bounded(tmp_path, glm):
    assert "did not appear within 1 seconds" in glm("verify", tmp_path / "nowhere", "--wait-seconds", 1).mistake()
