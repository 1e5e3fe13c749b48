"""A control group with less memory than the model needs: rejected in one line, before the weights are read."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from control_groups import limited_memory

from entrypoints.checkpoint import native
from entrypoints.checkpoint.layout import ModelConfig, tensor_mappings
from entrypoints.checkpoint.native import open_native
from entrypoints.quantization.tensor_types import plan_tensor_types

LIMIT = 1 << 30
SMALL_LIMIT = 640 << 20  # Python and torch use half of it
LARGE = ModelConfig(8, 2048, 32, 2, 64, 11008, 2432, 1024, 1e-5, 1)  # 640 million parameters


@pytest.fixture(scope="module")
def large(toy_native, tmp_path_factory) -> Path:
    """A complete checkpoint whose weights are a hole in a sparse file: they use no disk space."""
    folder = tmp_path_factory.mktemp("large") / "native"
    folder.mkdir()
    header, end = {}, 0
    for entry in tensor_mappings(LARGE):
        for name, size in entry.native_shapes().items():
            start, end = end, end + 2 * int(np.prod(size))
            header[name] = {"dtype": "F16", "shape": size, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)
    toy = open_native(toy_native)
    native.copy_vocabulary(toy_native, folder)
    native.write_config_files(folder, LARGE, "float16", toy.tokenizer, toy.prompt_format)
    return folder


@pytest.fixture(scope="module")
def large_gguf(large) -> Path:
    """The same as a sparse GGUF file: metadata, and a hole."""
    from entrypoints.quantization import gguf_vocabulary
    from entrypoints.quantization import gguf_writer as writing

    file, checkpoint = large.parent / "large.gguf", open_native(large)
    writer = gguf.GGUFWriter(None, writing.ARCHITECTURE)
    vocabulary = gguf_vocabulary.read_vocabulary(checkpoint)
    writing._add_metadata(writer, checkpoint, "f16", writing.GgufOptions())
    gguf_vocabulary.add_vocabulary(writer, checkpoint, vocabulary)
    planned = plan_tensor_types(LARGE, "f16")
    for plan in planned:
        writer.add_tensor_info(plan.name, plan.entry.shape, np.dtype(np.float32), plan.size, plan.ggml_type)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size + sum(plan.size for plan in planned) + 4096)
    return file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "kind", "limit"),
    [
        ("chat", "file", LIMIT),
        ("serve", "file", LIMIT),
        ("chat", "folder", LIMIT),
        ("serve", "folder", LIMIT),
        ("int8", "folder", LIMIT),
        ("q4_0", "folder", SMALL_LIMIT),
    ],
)
def test_a_model_that_exceeds_the_limit_is_rejected_before_it_is_read(job, kind, limit, large, large_gguf, tmp_path):
    model = large_gguf if kind == "file" else large
    arguments = {
        "chat": ["chat", "--model", model, "--prompt", "你好", "--device", "cpu"],
        "serve": ["serve", "--model", model, "--port", "0", "--device", "cpu"],
        "int8": ["quantize", model, tmp_path / "out", "--type", "int8"],
        "q4_0": ["quantize", model, tmp_path / "out.gguf", "--type", "q4_0"],
    }[job]
    with limited_memory(limit) as inside:
        command = [*inside, sys.executable, "-m", "entrypoints", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stderr
    assert "B of memory" in done.stderr.splitlines()[-1]
    assert "are available" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_quantizing_needs_less_memory_than_the_source_has(large, tmp_path):
    """It is written and validated layer by layer."""
    assert (large / "model.safetensors").stat().st_size > LIMIT
    with limited_memory(LIMIT) as inside:
        command = [*inside, sys.executable, "-m", "entrypoints", "quantize", str(large), str(tmp_path / "out.gguf")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "mean KL 0.00000" in done.stderr  # all weights are zero


@pytest.mark.slow
def test_doctor_reports_the_limit():
    with limited_memory(LIMIT) as inside:
        command = [*inside, sys.executable, "-m", "entrypoints", "doctor"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("memory ")]
    assert "cgroup limit 1.1 GB; the 6B model as q4_0 needs 5.1 GB: raise the container's limit" in line
