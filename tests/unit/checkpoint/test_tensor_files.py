"""Weight files in both formats, in one file and in shards, intact and damaged."""

import json
import logging
import os
import re

import pytest
import torch
from safetensors.torch import save_file

from entrypoints.checkpoint.tensor_files import open_weight_files, read_json
from entrypoints.errors import UserError

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.float16)}


def save_bin(tensors, file):
    torch.save(tensors, file)


def write(folder, stem, suffix, shards):
    """Write TENSORS to one file, or to one shard each with an index; returns the files."""
    save = {"safetensors": save_file, "bin": save_bin}[suffix]
    if shards == 1:
        save(TENSORS, folder / f"{stem}.{suffix}")
        return [folder / f"{stem}.{suffix}"]
    files = [folder / f"{stem}-0000{number}-of-00002.{suffix}" for number in (1, 2)]
    for file, name in zip(files, TENSORS, strict=True):
        save({name: TENSORS[name]}, file)
    weight_map = {name: file.name for file, name in zip(files, TENSORS, strict=True)}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


KINDS = pytest.mark.parametrize(("stem", "suffix"), [("model", "safetensors"), ("pytorch_model", "bin")])


@KINDS
@pytest.mark.parametrize("shards", [1, 2])
def test_weights_are_found_in_one_file_and_in_shards_in_both_formats(stem, suffix, shards, tmp_path):
    files = write(tmp_path, stem, suffix, shards)
    stored = open_weight_files(tmp_path)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in stored.tensors.items()} == {
        "a": ((2, 3), torch.float32),
        "b": ((4,), torch.float16),
    }
    assert stored.nbytes == 6 * 4 + 4 * 2
    read = {name: tensor for file in files for name, tensor in stored.load_file(file).items()}
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


def test_safetensors_are_preferred_to_bin_and_the_format_is_logged(tmp_path, caplog):
    """Both formats are present, with different values."""
    write(tmp_path, "model", "safetensors", 1)
    torch.save({name: tensor + 1 for name, tensor in TENSORS.items()}, tmp_path / "pytorch_model.bin")
    with caplog.at_level(logging.DEBUG):
        stored = open_weight_files(tmp_path)
    assert {tensor.file.name for tensor in stored.tensors.values()} == {"model.safetensors"}
    assert f"reading 1 safetensors file(s) of {tmp_path}" in caplog.messages


@KINDS
def test_every_missing_shard_is_named(stem, suffix, tmp_path):
    for file in write(tmp_path, stem, suffix, 2):
        file.unlink()
    missing = f"{stem}-00001-of-00002.{suffix}, {stem}-00002-of-00002.{suffix}"
    with pytest.raises(UserError, match=f"lacks {re.escape(missing)}, listed in {stem}.{suffix}.index.json"):
        open_weight_files(tmp_path)


@KINDS
def test_shards_without_their_index_are_rejected(stem, suffix, tmp_path):
    write(tmp_path, stem, suffix, 2)
    (tmp_path / f"{stem}.{suffix}.index.json").unlink()
    with pytest.raises(UserError, match=rf"contains {stem}-00001-of-00002\.{suffix} but no"):
        open_weight_files(tmp_path)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_files_is_rejected(index, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="has no weight_map"):
        open_weight_files(tmp_path)


@KINDS
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_rejected_by_name(stem, suffix, kept, tmp_path):
    file = write(tmp_path, stem, suffix, 2)[1]
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match=rf"{stem}-00002-of-00002\.{suffix}.*again"):
        open_weight_files(tmp_path)


@KINDS
def test_an_lfs_pointer_is_named(stem, suffix, tmp_path):
    write(tmp_path, stem, suffix, 2)[0].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=rf"{stem}-00001-of-00002\.{suffix} is a Git LFS pointer.*git lfs pull"):
        open_weight_files(tmp_path)


@KINDS
def test_a_file_damaged_after_the_check_is_rejected_by_name_when_read(stem, suffix, tmp_path):
    file = write(tmp_path, stem, suffix, 1)[0]
    stored = open_weight_files(tmp_path)
    file.write_bytes(b"no weights")
    with pytest.raises(UserError, match=rf"{stem}\.{suffix}"):
        stored.load_file(file)


class Malicious:
    """Unpickling it creates a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_code_in_a_bin_file_is_rejected_and_not_run(tmp_path):
    (tmp_path / "weights").mkdir()
    torch.save({"a": Malicious(tmp_path / "executed")}, tmp_path / "weights" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin cannot be read"):
        open_weight_files(tmp_path / "weights")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content", [[torch.zeros(1)], torch.zeros(1), {"state_dict": {"a": torch.zeros(1)}}, {1: torch.zeros(1)}]
)
def test_a_bin_file_without_named_tensors_is_rejected(content, tmp_path):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin contains .*not"):
        open_weight_files(tmp_path)


def test_a_folder_without_weights_is_rejected_with_the_expected_files(tmp_path):
    with pytest.raises(UserError, match=r"contains no weights; it needs model\*\.safetensors or pytorch_model\*\.bin"):
        open_weight_files(tmp_path)
    with pytest.raises(UserError, match="folder not found"):
        open_weight_files(tmp_path / "nothing")


def test_every_tensor_that_is_missing_unexpected_or_of_the_wrong_shape_is_named(tmp_path):
    """Each of them is an error, except optional tensors."""
    write(tmp_path, "model", "safetensors", 1)
    stored = open_weight_files(tmp_path)
    stored.check_shapes({"a": (2, 3)}, optional=frozenset({"b"}))
    with pytest.raises(UserError) as caught:
        stored.check_shapes({"a": (3, 2), "c": (1,)})
    words = ["missing: c", "unexpected: b", "of the wrong shape: a [2, 3], not [3, 2]", str(tmp_path)]
    assert [word for word in words if word not in str(caught.value)] == []


def test_of_many_missing_tensors_the_first_are_named_and_the_rest_counted(tmp_path):
    write(tmp_path, "model", "safetensors", 1)
    expected = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()} | {f"t{n}": (1,) for n in range(9)}
    with pytest.raises(UserError, match="missing: t0, t1, t2, t3 and 5 more"):
        open_weight_files(tmp_path).check_shapes(expected)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_damaged_json_file_is_rejected_by_name(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json"):
        read_json(tmp_path / "config.json")
