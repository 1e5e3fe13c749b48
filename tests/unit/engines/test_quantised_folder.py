"""Folders in 8 and 4 bits: as `--load-in` in memory, smaller to load, and refused for all but answering.

Traps I2 and I3 of the list of reported pains. Bitsandbytes computes on processors too; what only CUDA shows is marked.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from entrypoints.checkpoint import native
from entrypoints.checkpoint.conversion import convert_to_original
from entrypoints.checkpoint.layout import FOLDER_TYPES, Shape, tensors
from entrypoints.checkpoint.manifest import read_manifest
from entrypoints.checkpoint.native import open_native
from entrypoints.engines import gguf_check, placement, quantised_folder
from entrypoints.engines.loading import PACKAGES, check
from entrypoints.engines.placement import loaded_bytes
from entrypoints.engines.quantised_folder import quantise_folder
from entrypoints.engines.transformers_engine import TransformersEngine
from entrypoints.errors import UserError
from entrypoints.sampling import Sampling

pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes (extra qlora)")
PROMPT = [300, 301, 302, 303, 304]
GREEDY = Sampling(max_new_tokens=12, temperature=0)
LARGER = Shape(4, 1024, 16, 2, 64, 4096, 2432, 1024, 1e-5, 1)  # 60 million numbers: its peak of memory can be told
# In a process of its own: greedy ids, and the kilobytes that loading took at most.
PROGRAM = """
import json, sys
from pathlib import Path
import torch, transformers, bitsandbytes
from entrypoints.engines.transformers_engine import TransformersEngine
from entrypoints.sampling import Sampling
def peak():  # not getrusage: that counts what this process was before it became Python, a copy of the tests' own
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
engine = TransformersEngine.load(Path(sys.argv[1]), device="cpu", dtype=sys.argv[2])
taken = peak() - before
print(json.dumps([list(engine.generate(json.loads(sys.argv[3]), Sampling(max_new_tokens=12, temperature=0))), taken]))
"""


@pytest.fixture(scope="module")
def made(toy_native, tmp_path_factory) -> Callable[[str], Path]:
    """The toy in a type, made once."""
    home, folders = tmp_path_factory.mktemp("quantised"), {}

    def make(type_: str) -> Path:
        if type_ not in folders:
            quantise_folder(toy_native, home / type_, type_)
            folders[type_] = home / type_
        return folders[type_]

    return make


@pytest.fixture(scope="module")
def larger(toy_native, tmp_path_factory) -> Path:
    """A random model of LARGER's shape with the toy's vocabulary, in half precision."""
    folder = tmp_path_factory.mktemp("larger") / "native"
    folder.mkdir()
    shapes = {name: size for entry in tensors(LARGER) for name, size in entry.native_shapes().items()}
    weights = {name: (torch.randn(size) * 0.02).half() for name, size in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    toy = open_native(toy_native)
    native.copy_vocabulary(toy_native, folder)
    native.write_settings(folder, LARGER, "float16", toy.tokenizer, toy.prompt_format)
    return folder


def in_a_fresh_process(folder: Path, dtype: str) -> tuple[list[int], int]:
    words = [sys.executable, "-c", PROGRAM, str(folder), dtype, json.dumps(PROMPT)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("type_", FOLDER_TYPES)
def test_a_fresh_process_answers_as_what_was_quantised_in_memory(type_, made, toy_native):
    """I3."""
    in_memory = TransformersEngine.load(toy_native, device="cpu", dtype="float32", load_in=FOLDER_TYPES[type_])
    assert in_a_fresh_process(made(type_), "float32")[0] == list(in_memory.generate(PROMPT, GREEDY))


@pytest.mark.parametrize("type_", FOLDER_TYPES)
def test_the_folder_is_described_whole_and_says_what_it_is(type_, made, toy_native):
    checkpoint = open_native(made(type_), verify=True, quantised=True)
    origin = read_manifest(made(type_))["provenance"]
    assert checkpoint.load_in == FOLDER_TYPES[type_]
    assert (origin["made_by"], origin["type"], origin["source"]) == ("glm quantize", type_, toy_native.name)
    assert checkpoint.files.size == pytest.approx(loaded_bytes(checkpoint.shape, checkpoint.load_in, 2), rel=0.02)
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in made(type_).glob("*.safetensors"))


@pytest.mark.parametrize("type_", FOLDER_TYPES)
def test_loading_it_never_takes_what_the_whole_model_takes(type_, larger, tmp_path):
    """I3: 16 bits are read nowhere on the way."""
    size, found = quantise_folder(larger, tmp_path / type_, type_)
    assert size < 0.7 * (larger / "model.safetensors").stat().st_size
    assert 0 <= found.divergence <= gguf_check.BOUNDS[type_]
    whole, small = in_a_fresh_process(larger, "bfloat16")[1], in_a_fresh_process(tmp_path / type_, "bfloat16")[1]
    assert small < 0.75 * whole


@pytest.mark.parametrize("what", ["convert", "export", "gguf", "folder", "vllm"])
def test_it_is_refused_for_all_but_answering(what, made, tmp_path, monkeypatch):
    """I2."""
    from entrypoints.engines.quantising import Order, quantise
    from entrypoints.training.export import export

    ways = {
        "convert": lambda folder, target: convert_to_original(folder, target, "keep", False),
        "export": lambda folder, target: export(folder, target, None, "auto", False),
        "gguf": lambda folder, target: quantise(Order(folder, target.with_suffix(".gguf"), "q4_0")),
        "folder": lambda folder, target: quantise_folder(folder, target, "int8"),
        "vllm": lambda folder, target: check("vllm", folder, {}),
    }
    monkeypatch.setitem(PACKAGES, "vllm", "torch")  # as if it were there
    with pytest.raises(UserError, match=r"is quantised already: it can be asked, not tuned.*name the checkpoint"):
        ways[what](made("int8"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("adapters", "load_in", "there", "words"),
    [
        ({"mine": Path("x")}, None, True, "stored in fewer bits, takes no --adapter; merge a LoRA first"),
        ({}, "4bit", True, "is stored in 8 bits already; leave out --load-in"),
        ({}, None, False, "needs the package bitsandbytes"),
    ],
)
def test_what_cannot_be_asked_of_it_is_told_before_loading(adapters, load_in, there, words, made, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" and not there else find(name)
    )
    with pytest.raises(UserError, match=words):
        check("transformers", made("int8"), adapters, load_in)


def test_scales_that_are_missing_are_told_by_name(made, tmp_path):
    for type_, name in (("int8", "mlp.down_proj.SCB"), ("nf4", "mlp.down_proj.weight.absmax")):
        folder = shutil.copytree(made(type_), tmp_path / type_)
        (folder / "manifest.json").unlink()
        weights = load_file(folder / "model.safetensors")
        del weights[f"model.layers.1.{name}"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=rf"missing: model\.layers\.1\.{name}"):
            open_native(folder, quantised=True)


@pytest.mark.parametrize("way", [{"quant_method": "gptq", "bits": 4}, {"load_in_4bit": True}, "int8"])
def test_another_programs_quantisation_is_not_guessed_at(way, toy_native, tmp_path):
    folder = shutil.copytree(toy_native, tmp_path / "native")
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": way}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"names a quantisation that is not read here; glm quantize makes int8, nf4"):
        open_native(folder, quantised=True)


def test_one_too_far_from_its_source_is_not_kept(toy_native, tmp_path, monkeypatch):
    monkeypatch.setitem(gguf_check.BOUNDS, "int8", 1e-9)
    with pytest.raises(UserError, match="the int8 model is not its source: mean KL"):
        quantise_folder(toy_native, tmp_path / "out", "int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["mps", "old driver"])
def test_it_is_checked_on_the_processor_whatever_else_there_is(device, toy_native, tmp_path, monkeypatch):
    """All the work is done by then: a GPU that cannot load it must not cost it."""
    if device == "mps":
        monkeypatch.setattr(placement, "_kind", lambda asked: "mps" if asked == "auto" else asked)
    else:
        monkeypatch.setattr(placement, "check_driver", lambda: pytest.fail("asked for the driver"))
    _, found = quantise_folder(toy_native, tmp_path / "out", "nf4")
    assert 0 <= found.divergence <= gguf_check.BOUNDS["nf4"]


def test_what_the_check_loads_in_float32_is_counted_before_the_work(toy_native, tmp_path, monkeypatch):
    """A processor without bfloat16 doubles embedding and output layer, more than the quantiser needs."""
    shape = open_native(toy_native).shape
    monkeypatch.setattr(quantised_folder, "cpu_computes_bf16", lambda: False)
    monkeypatch.setattr(quantised_folder, "quantising_bytes", lambda shape: 0)
    monkeypatch.setattr(quantised_folder, "available_memory", lambda: loaded_bytes(shape, "8bit", 4))
    with pytest.raises(UserError, match=r"quantising .* to int8 needs"):
        quantise_folder(toy_native, tmp_path / "out", "int8")


def test_too_little_memory_is_told_before_anything_is_read(toy_native, tmp_path, monkeypatch):
    monkeypatch.setattr("entrypoints.engines.quantised_folder.available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"to nf4 needs 0\.0 GB of memory, 0\.0 GB are available"):
        quantise_folder(toy_native, tmp_path / "out", "nf4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("type_", FOLDER_TYPES)
def test_on_a_gpu_it_answers_as_what_was_quantised_there(type_, made, toy_native):
    in_memory = TransformersEngine.load(toy_native, device="cuda", load_in=FOLDER_TYPES[type_])
    stored = TransformersEngine.load(made(type_), device="cuda")
    assert list(stored.generate(PROMPT, GREEDY)) == list(in_memory.generate(PROMPT, GREEDY))
