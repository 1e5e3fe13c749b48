"""A file or folder without permission, as root leaves it for user 10001: one line with the path and what helps."""

import os
import shutil
from pathlib import Path

import pytest
from permissions import denied

from entrypoints.checkpoint.manifest import record_path, write_file_record

USER = f"user {os.getuid()}, group {os.getgid()}"


@pytest.fixture
def native(toy_native, tmp_path):
    return shutil.copytree(toy_native, tmp_path / "native")


@pytest.fixture
def gguf(toy_gguf, tmp_path):
    """A file with its record, as in a model store."""
    file = Path(shutil.copy(toy_gguf, tmp_path))
    write_file_record(file, file)
    return file


def readable(file: Path) -> str:
    """The remedy for a file."""
    return f"make it readable for {USER}: chgrp {os.getgid()} {file} && chmod 640 {file}"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("command", ["serve", "chat"])
def test_a_file_of_a_model_is_named_with_the_command_that_helps(command, name, native, glm):
    file = native / name
    flags = ["--port", 0] if command == "serve" else ["--prompt", "你好"]
    with denied(file):
        mistake = glm(command, "--model", native, *flags).mistake()
    assert mistake == f"glm: cannot read {file} (Permission denied); {readable(file)}"


def test_a_gguf_file_is_named_with_the_command_that_helps(gguf, glm):
    with denied(gguf):
        mistake = glm("serve", "--model", gguf, "--port", 0).mistake()
    assert mistake == f"glm: cannot read {gguf} (Permission denied); {readable(gguf)}"


def test_the_record_of_a_gguf_file_is_named_with_the_command_that_helps(gguf, glm):
    with denied(record_path(gguf)):
        mistake = glm("verify", gguf).mistake()
    assert mistake == f"glm: cannot read {record_path(gguf)} (Permission denied); {readable(record_path(gguf))}"


@pytest.mark.parametrize("command", ["serve", "verify"])
def test_a_folder_that_may_not_be_entered_is_named_in_the_remedy(command, native, glm):
    with denied(native):
        words = ["serve", "--port", 0, "--model"] if command == "serve" else ["verify"]
        mistake = glm(*words, native).mistake()
    assert f"make {native} accessible for {USER}: chgrp {os.getgid()} {native} && chmod g+rx {native}" in mistake


@pytest.mark.parametrize("closed", ["data", "data/train.jsonl"])
@pytest.mark.parametrize("given", ["data", "data/train.jsonl"])
def test_rows_are_one_line_too(given, closed, toy_native, tmp_path, glm):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"content": "a", "summary": "b"}\n')
    words = ["train", "--model-name-or-path", toy_native, "--output-dir", tmp_path / "run", "--train-file"]
    with denied(tmp_path / closed):
        mistake = glm(*words, tmp_path / given).mistake()
    assert f"cannot read {tmp_path}/data" in mistake
    assert "Permission denied" in mistake


def test_a_source_that_is_converted_is_named_and_not_the_target(toy_original, tmp_path, glm):
    source = shutil.copytree(toy_original, tmp_path / "original")
    file = source / "pytorch_model-00002-of-00002.bin"
    with denied(file):
        mistake = glm("convert", source, tmp_path / "native").mistake()
    assert mistake == f"glm: cannot read {file} (Permission denied); {readable(file)}"
    assert not (tmp_path / "native").exists()


def test_any_error_that_names_a_file_is_one_line_and_debug_shows_its_traceback(glm):
    words = ["verify", "x" * 300]
    assert (
        glm(*words).mistake()
        == f"glm: cannot use {'x' * 300} (File name too long); check the path; --debug shows where"
    )
    with pytest.raises(OSError, match="too long"):
        glm(*words, "--debug")


def test_an_os_error_that_names_no_file_is_a_bug(glm, monkeypatch):
    monkeypatch.setattr("entrypoints.jobs.verify.run", lambda *_: os.close(-1))
    with pytest.raises(OSError, match="Bad file descriptor"):
        glm("verify", "x")
