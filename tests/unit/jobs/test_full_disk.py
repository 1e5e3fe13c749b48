"""A disk that fills while a folder is written: told in one line wherever it happens, and nothing half made stays.

Another program's file leaves less and less of a real disk, from just too little down to where the job does not start.
"""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
import torch
from small_disk import with_small_disk

PAGE = 4096  # what a file of a tmpfs grows by
PROGRAM = """
import contextlib, io, json, os, shutil, sys
from pathlib import Path
from entrypoints.__main__ import main

disk, step, words = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]

def ended(room):
    (disk / "other").unlink(missing_ok=True)
    with (disk / "other").open("wb") as other:
        os.posix_fallocate(other.fileno(), 0, shutil.disk_usage(disk).free - room)
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        code = main(words)
    left = sorted(path.name for path in disk.iterdir() if path.name != "other")
    if code == 0:
        shutil.rmtree(disk / "out")
    return code, told.getvalue(), left

short, enough = 0, shutil.disk_usage(disk).free // step - 1
assert ended(enough * step)[0] == 0
while enough - short > 1:
    middle = (short + enough) // 2
    short, enough = (short, middle) if ended(middle * step)[0] == 0 else (middle, enough)
ends = [ended(short * step)]
while short and "needs" not in ends[-1][1]:
    short -= 1
    ends.append(ended(short * step))
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def prefix(toy_original, tmp_path_factory):
    """An adapter for the toy as the tutorial's scripts save it."""
    folder = tmp_path_factory.mktemp("prefix")
    config = json.loads((toy_original / "config.json").read_text()) | {"pre_seq_len": 4}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"transformer.prefix_encoder.embedding.weight": torch.zeros(4, 512)}, folder / "pytorch_model.bin")
    return folder


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
def test_wherever_the_disk_fills_the_folder_and_the_remedy_are_named_and_nothing_stays(
    job, kind, flags, pages, toy_original, toy_native, prefix, tmp_path
):
    if job == "quantize" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs the package bitsandbytes (extra qlora)")
    source = {"original": toy_original, "native": toy_native, "prefix": prefix}[kind]
    words = [tmp_path, pages * PAGE, job, source, tmp_path / "out", *flags]
    command = [*with_small_disk(tmp_path, 64), sys.executable, "-c", PROGRAM, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)
    full = rf"glm: writing {tmp_path}/(\.out\.native|out) failed: .*No space left.*; free space or check the disk"
    for code, told, left in ends[:-1]:
        assert (code, left, told.count("glm: ")) == (1, [], 1), told
        assert re.fullmatch(full, told.splitlines()[-1]), told
    assert any("Error while serializing" in told for _, told, _ in ends)
    assert ends[-1][0] == 1
    assert kind == "prefix" or re.search(r"glm: .* needs .* GB free; free space or", ends[-1][1]), ends[-1][1]
