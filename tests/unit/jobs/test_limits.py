"""A control group that lets a process take less than its model: refused in one line, before a byte of it is read."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from control_groups import limited_memory

from entrypoints.checkpoint import native
from entrypoints.checkpoint.gguf_plan import plans
from entrypoints.checkpoint.layout import Shape, tensors
from entrypoints.checkpoint.native import open_native

LIMIT = 1 << 30
LEAST = 640 << 20  # Python and torch take half of it
LARGE = Shape(8, 2048, 32, 2, 64, 11008, 2432, 1024, 1e-5, 1)  # 640 million numbers


@pytest.fixture(scope="module")
def large(toy_native, tmp_path_factory) -> Path:
    """A whole checkpoint of LARGE's shape whose weights are a hole in the file: they take no disk."""
    folder = tmp_path_factory.mktemp("large") / "native"
    folder.mkdir()
    header, end = {}, 0
    for entry in tensors(LARGE):
        for name, size in entry.native_shapes().items():
            start, end = end, end + 2 * int(np.prod(size))
            header[name] = {"dtype": "F16", "shape": size, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)
    toy = open_native(toy_native)
    native.copy_vocabulary(toy_native, folder)
    native.write_settings(folder, LARGE, "float16", toy.tokenizer, toy.prompt_format)
    return folder


@pytest.fixture(scope="module")
def large_gguf(large) -> Path:
    """The same as a GGUF file: all that describes it, and a hole."""
    from entrypoints.checkpoint import gguf_writing as writing

    file, checkpoint = large.parent / "large.gguf", open_native(large)
    writer = gguf.GGUFWriter(None, writing.ARCHITECTURE)
    vocabulary = writing._vocabulary(large, checkpoint.tokenizer, LARGE.vocabulary)
    writing._describe(writer, checkpoint, "f16", writing.Extras())
    writing._add_vocabulary(writer, checkpoint, vocabulary)
    planned = plans(LARGE, "f16")
    for plan in planned:
        writer.add_tensor_info(plan.name, plan.entry.shape, np.dtype(np.float32), plan.size, plan.kind)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size + sum(plan.size for plan in planned) + 4096)
    return file


@pytest.mark.parametrize(
    ("job", "kind", "limit"),
    [
        ("chat", "file", LIMIT),
        ("serve", "file", LIMIT),
        ("chat", "folder", LIMIT),
        ("serve", "folder", LIMIT),
        ("int8", "folder", LIMIT),
        ("q4_0", "folder", LEAST),
    ],
)
def test_a_limit_smaller_than_what_is_needed_is_refused_before_it_is_read(
    job, kind, limit, large, large_gguf, tmp_path
):
    model = large_gguf if kind == "file" else large
    words = {
        "chat": ["chat", "--model", model, "--prompt", "你好", "--device", "cpu"],
        "serve": ["serve", "--model", model, "--port", "0", "--device", "cpu"],
        "int8": ["quantize", model, tmp_path / "out", "--type", "int8"],
        "q4_0": ["quantize", model, tmp_path / "out.gguf", "--type", "q4_0"],
    }[job]
    with limited_memory(limit) as inside:
        command = [*inside, sys.executable, "-m", "entrypoints", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stderr
    assert "GB of memory" in done.stderr.splitlines()[-1]
    assert "are available" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_made_within_a_limit_smaller_than_its_source(large, tmp_path):
    """It is written and checked a layer at a time."""
    assert (large / "model.safetensors").stat().st_size > LIMIT
    with limited_memory(LIMIT) as inside:
        command = [*inside, sys.executable, "-m", "entrypoints", "quantize", str(large), str(tmp_path / "out.gguf")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "mean KL 0.00000" in done.stderr  # of nothing but zeros


def test_the_limit_is_what_doctor_tells():
    with limited_memory(LIMIT) as inside:
        command = [*inside, sys.executable, "-m", "entrypoints", "doctor"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("memory ")]
    assert "1.1 GB are the control group's limit; the 6B as q4_0 needs 5.1: raise the container's limit" in line
