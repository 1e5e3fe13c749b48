"""Weight files and shard indexes that name other files, claim too much or contradict themselves."""

import json
import os
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from entrypoints.checkpoint.atomic_files import read_safetensors_header
from entrypoints.checkpoint.manifest import write_manifest
from entrypoints.checkpoint.native import open_native
from entrypoints.checkpoint.tensor_files import open_weight_files
from entrypoints.errors import UserError
from entrypoints.untrusted import WEIGHT_SUFFIXES


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(file, header, data_bytes):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data_bytes))
    return file


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry([2], [0, 8]), "b": entry([2], [4, 12])},
        {"a": entry([2], [0, 8]), "b": entry([1], [0, 4]), "c": entry([1], [8, 12])},
        {"a": entry([1], [0, 4]), "b": entry([1], [8, 12])},
        {"a": entry([3], [8, -4]), "b": entry([3], [0, 12])},
        {"a": entry([-3], [0, 12])},
        {"a": entry([-1, -3], [0, 12])},
        {"a": entry([True, 3], [0, 12])},
        {"a": entry([3.0], [0, 12])},
        {"a": entry(["3"], [0, 12])},
        {"a": entry([0, 2**63], [0, 0]), "b": entry([3], [0, 12])},
        {"a": entry([4], [0, 12])},
        {"a": entry([3], [0, 12], "F1000")},
        {"a": entry([3], [0, 12, 12])},
        {"a": entry([3], [0])},
        {"a": entry([3], None)},
        {"a": entry(3, [0, 12])},
        {"a": [3]},
        [],
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"\xff",
    ],
    ids=lambda header: f"{header!r:.70}",
)
def test_a_header_that_contradicts_itself_is_a_user_error(header, tmp_path):
    file = write(tmp_path / "model.safetensors", header, 12)
    with pytest.raises(UserError, match=r"model\.safetensors is not a safetensors file"):
        read_safetensors_header(file)


@pytest.mark.parametrize("offsets", [[0, 16], [0, 2**60]], ids=str)
def test_offsets_beyond_the_file_are_a_user_error(offsets, tmp_path):
    file = write(tmp_path / "model.safetensors", {"a": entry([offsets[1] // 4], offsets)}, 12)
    with pytest.raises(UserError, match=r"model\.safetensors (has|is not)"):
        read_safetensors_header(file)


def test_a_huge_header_is_not_read(tmp_path):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 10**11))
        stream.truncate(10**12)
    with pytest.raises(UserError, match="its header has 100000000000 bytes"):
        read_safetensors_header(file)


def test_empty_tensors_and_scalars_are_accepted(tmp_path):
    save_file({"a": torch.zeros(0, 5), "b": torch.tensor(1.0), "c": torch.ones(3)}, tmp_path / "model.safetensors")
    assert set(read_safetensors_header(tmp_path / "model.safetensors")) == {"a", "b", "c"}


@pytest.mark.parametrize("name", ["../out.safetensors", "/out.safetensors", "link.safetensors", "a\\b.safetensors"])
def test_an_index_that_names_a_file_outside_the_folder_is_rejected(name, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(3)}, tmp_path / "out.safetensors")
    (tmp_path / "secret").write_text("secret")
    (folder / "link.safetensors").symlink_to(tmp_path / "secret")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match=r"index\.json names "):
        open_weight_files(folder)


def write_index(folder: Path, names: Iterable[str]) -> None:
    """Name the weights of a native folder as a shard, with an index."""
    file = folder / "model.safetensors"
    shard = file.rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, shard.name)}
    (folder / f"{file.name}.index.json").write_text(json.dumps(index))
    write_manifest(folder, {})


def move_and_link(files: list[Path], target: Path) -> None:
    """Replace files by links to `target`; in the cache of the hub they are named by their hashes."""
    for number, file in enumerate(files):
        moved = shutil.move(file, target / (f"{number:064x}" if target.name == "blobs" else file.name))
        file.symlink_to(os.path.relpath(moved, file.parent) if target.name == "blobs" else moved)


@pytest.mark.parametrize("kind", ["snapshot", "folder of links to the cache", "other disk"])
@pytest.mark.parametrize("layout", ["toy_native", "toy_original"])
def test_a_folder_of_links_to_another_disk_or_the_hub_cache_is_read(kind, layout, request, tmp_path):
    """Users link large files to a NAS, and earlier versions of the hub's client linked into its cache."""
    repository = tmp_path / "hub" / "models--org--name"
    folder = repository / "snapshots" / "c0ffee" if kind == "snapshot" else tmp_path / "model"
    target = tmp_path / "nas" if kind == "other disk" else repository / "blobs"
    shutil.copytree(request.getfixturevalue(layout), folder)
    expected = open_weight_files(folder)
    if layout == "toy_native":  # the original has shards
        write_index(folder, expected.tensors)
    target.mkdir(parents=True)
    files = sorted(folder.iterdir())
    move_and_link(files if kind == "snapshot" else [file for file in files if file.suffix in WEIGHT_SUFFIXES], target)
    found = open_weight_files(folder)
    assert {name: info.shape for name, info in found.tensors.items()} == {
        name: info.shape for name, info in expected.tensors.items()
    }
    if layout == "toy_native":
        assert open_native(folder, verify=True).model_config


@pytest.mark.parametrize("target", ["pipe.safetensors", "folder.safetensors", "missing.safetensors"])
def test_a_link_to_something_that_is_no_file_is_missing(target, tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.safetensors").symlink_to(tmp_path / target)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    with pytest.raises(UserError, match=r"lacks a\.safetensors"):
        open_weight_files(folder)


def test_an_index_of_safetensors_names_no_pickled_file(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "x.bin")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x.bin"}}))
    with pytest.raises(UserError, match=r"names 'x\.bin', which is not a \.safetensors file"):
        open_weight_files(tmp_path)


def test_a_pickled_tensor_that_repeats_its_values_is_rejected(tmp_path):
    torch.save({"a": torch.ones(1).expand(10**12)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="claims more values for a than it contains"):
        open_weight_files(tmp_path)


def test_an_empty_tensor_of_a_huge_shape_is_a_user_error(tmp_path):
    """The strides are products of its dimensions."""
    file = write(tmp_path / "model.safetensors", {"a": entry([0, 2**40, 2**40], [0, 0])}, 0)
    with pytest.raises(UserError, match=r"model\.safetensors is not a safetensors file \(.*a: invalid shape"):
        open_weight_files(file.parent)


def test_a_pickled_file_with_a_damaged_end_is_a_user_error(tmp_path):
    """Its directory claims to be spread over several disks, which zipfile reports in another way."""
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    content = bytearray((tmp_path / "pytorch_model.bin").read_bytes())
    locator = content.rindex(b"PK\x06\x07")
    content[locator + 16] = 9  # number of disks
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"pytorch_model\.bin is truncated or not a PyTorch file"):
        open_weight_files(tmp_path)
