import hashlib
import json
import shutil
import threading
from pathlib import Path

import pytest


@pytest.fixture
def folder(toy_native, tmp_path):
    return shutil.copytree(toy_native, tmp_path / "native")


def test_a_whole_checkpoint_is_told_with_its_count(folder, glm):
    files = len(list(folder.iterdir())) - 1  # the manifest does not describe itself
    assert files >= 8
    assert glm("verify", folder).out == f"{folder}: {files} files as the manifest says\n"


def test_one_changed_byte_in_the_weights_is_found(folder, glm):
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "model.safetensors has other contents" in glm("verify", folder).mistake()


def test_every_file_that_is_wrong_is_named_at_once(folder, glm):
    (folder / "tokenizer.json").unlink()
    (folder / "config.json").write_text("{}")
    told = glm("verify", folder).mistake()
    assert "tokenizer.json is missing" in told
    assert "config.json has 2 bytes" in told


@pytest.mark.parametrize("manifest", [None, "", "[]", '{"provenance": {}}'], ids=["none", "empty", "array", "half"])
def test_a_folder_without_a_sound_manifest_cannot_be_verified(manifest, folder, glm):
    (folder / "manifest.json").unlink()
    if manifest is not None:
        (folder / "manifest.json").write_text(manifest)
    assert "manifest.json" in glm("verify", folder).mistake()


def test_a_folder_that_is_not_there_is_a_mistake(tmp_path, glm):
    glm("verify", tmp_path / "nowhere").mistake()


@pytest.fixture
def gguf(toy_gguf, tmp_path):
    """As a model store holds it."""
    file = Path(shutil.copy(toy_gguf, tmp_path))
    fields = {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    file.with_name(f"{file.name}.json").write_text(json.dumps(fields))
    return file


def test_a_gguf_file_is_held_against_the_record_beside_it(gguf, glm):
    assert glm("verify", gguf).out == f"{gguf}: as it was made\n"
    with gguf.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"x")
    assert "other contents than when it was made" in glm("verify", gguf).mistake()
    gguf.with_name(f"{gguf.name}.json").unlink()
    assert "toy.gguf.json is missing" in glm("verify", gguf).mistake()


def test_it_waits_for_a_model_that_is_being_made(folder, tmp_path, glm):
    threading.Timer(1, folder.rename, [tmp_path / "later"]).start()
    assert glm("verify", tmp_path / "later", "--wait-seconds", 60).out.startswith(f"{tmp_path / 'later'}: ")


def test_it_does_not_wait_for_ever(tmp_path, glm):
    assert "did not appear within 1 seconds" in glm("verify", tmp_path / "nowhere", "--wait-seconds", 1).mistake()
