"""A disk that fills up while a folder is written: one message at whatever point, and no incomplete output.

A file of another program leaves less and less of a real disk, from just too little down to where a command does not
start writing.
"""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
import torch
from small_disk import with_small_disk

PAGE = 4096  # allocation unit of a tmpfs
PROGRAM = """
import contextlib, io, json, os, shutil, sys
from pathlib import Path
from entrypoints.__main__ import main

disk, step, words = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]

def run_with_free(free):
    (disk / "other").unlink(missing_ok=True)
    with (disk / "other").open("wb") as other:
        os.posix_fallocate(other.fileno(), 0, shutil.disk_usage(disk).free - free)
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        code = main(words)
    left = sorted(path.name for path in disk.iterdir() if path.name != "other")
    if code == 0:
        shutil.rmtree(disk / "out")
    return code, stderr.getvalue(), left

too_small, enough = 0, shutil.disk_usage(disk).free // step - 1
assert run_with_free(enough * step)[0] == 0
while enough - too_small > 1:
    middle = (too_small + enough) // 2
    too_small, enough = (too_small, middle) if run_with_free(middle * step)[0] == 0 else (middle, enough)
outcomes = [run_with_free(too_small * step)]
while too_small and "needs" not in outcomes[-1][1]:
    too_small -= 1
    outcomes.append(run_with_free(too_small * step))
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def prefix(toy_original, tmp_path_factory):
    """An adapter for the tiny model as the tutorial's scripts save it."""
    folder = tmp_path_factory.mktemp("prefix")
    config = json.loads((toy_original / "config.json").read_text()) | {"pre_seq_len": 4}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"transformer.prefix_encoder.embedding.weight": torch.zeros(4, 512)}, folder / "pytorch_model.bin")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "kind", "flags", "pages"),
    [
        ("convert", "original", (), 1),
        ("convert", "native", ("--to", "original"), 1),
        ("convert", "prefix", (), 1),
        ("export", "native", (), 1),
        ("export", "native", ("--to", "original"), 1),
        ("quantize", "native", ("--type", "int8"), 4),
    ],
)
def test_wherever_the_disk_fills_up_folder_and_remedy_are_named_and_nothing_remains(
    job, kind, flags, pages, toy_original, toy_native, prefix, tmp_path
):
    if job == "quantize" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs the package bitsandbytes (extra qlora)")
    source = {"original": toy_original, "native": toy_native, "prefix": prefix}[kind]
    words = [tmp_path, pages * PAGE, job, source, tmp_path / "out", *flags]
    command = [*with_small_disk(tmp_path, 64), sys.executable, "-c", PROGRAM, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    full = rf"glm: writing {tmp_path}/(\.out\.native|out) failed: .*No space left.*; free space or check the disk"
    for code, stderr, left in outcomes[:-1]:
        assert (code, left, stderr.count("glm: ")) == (1, [], 1), stderr
        assert re.fullmatch(full, stderr.splitlines()[-1]), stderr
    assert any("Error while serializing" in stderr for _, stderr, _ in outcomes)
    assert outcomes[-1][0] == 1
    assert kind == "prefix" or re.search(r"glm: .* needs .* free; free space or", outcomes[-1][1]), outcomes[-1][1]
