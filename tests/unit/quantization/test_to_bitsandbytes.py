"""Folders in 8 and 4 bits: equal to `--load-in`, smaller to load, inference only.

bitsandbytes computes on CPUs too; tests that need CUDA are marked.
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

from entrypoints.chat_format.prompt import Message, PromptFormat
from entrypoints.chat_format.sampling import Sampling
from entrypoints.checkpoint import native
from entrypoints.checkpoint.conversion import convert_to_native, convert_to_original
from entrypoints.checkpoint.layout import FOLDER_QUANTIZATIONS, ModelConfig, tensor_mappings
from entrypoints.checkpoint.manifest import read_manifest
from entrypoints.checkpoint.native import open_native
from entrypoints.demo.model import write_demo_model
from entrypoints.engines.loading import ENGINE_PACKAGES, check_engine_options
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.errors import UserError
from entrypoints.families import FAMILIES
from entrypoints.hardware import placement
from entrypoints.hardware.placement import quantized_weight_bytes
from entrypoints.quantization import divergence, to_bitsandbytes
from entrypoints.quantization.to_bitsandbytes import quantize_folder

pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes (extra qlora)")
PROMPT = [300, 301, 302, 303, 304]
GREEDY = Sampling(max_new_tokens=12, temperature=0)
LARGER = ModelConfig(
    4, 1024, 16, 2, 64, 4096, 2432, 1024, 1e-5, 1
)  # 60 million parameters: enough to measure the peak of memory
# Runs in its own process: prints greedy ids, and the peak of memory while loading in kilobytes.
PROGRAM = """
import json, sys
from pathlib import Path
import torch, transformers, bitsandbytes
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.chat_format.sampling import Sampling
def peak():  # not getrusage: its maximum includes the forked copy of the test process before exec
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
engine = TransformersEngine.load(Path(sys.argv[1]), EngineOptions(device="cpu", dtype=sys.argv[2]))
used = peak() - before
print(json.dumps([list(engine.generate(json.loads(sys.argv[3]), Sampling(max_new_tokens=12, temperature=0))), used]))
"""


@pytest.fixture(scope="module")
def quantized(toy_native, tmp_path_factory) -> Callable[[str], Path]:
    """The tiny model in a type, created once."""
    parent, folders = tmp_path_factory.mktemp("quantized"), {}

    def make(type_: str) -> Path:
        if type_ not in folders:
            quantize_folder(toy_native, parent / type_, type_)
            folders[type_] = parent / type_
        return folders[type_]

    return make


@pytest.fixture(scope="module")
def larger(toy_native, tmp_path_factory) -> Path:
    """A random float16 model of LARGER's dimensions with the vocabulary of the tiny model."""
    folder = tmp_path_factory.mktemp("larger") / "native"
    folder.mkdir()
    shapes = {name: size for entry in tensor_mappings(LARGER) for name, size in entry.native_shapes().items()}
    weights = {name: (torch.randn(size) * 0.02).half() for name, size in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    toy = open_native(toy_native)
    native.copy_vocabulary(toy_native, folder)
    native.write_config_files(folder, LARGER, "float16", toy.tokenizer, toy.prompt_format)
    return folder


def run_in_new_process(folder: Path, dtype: str) -> tuple[list[int], int]:
    command = [sys.executable, "-c", PROGRAM, str(folder), dtype, json.dumps(PROMPT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("type_", FOLDER_QUANTIZATIONS)
def test_a_new_process_gives_the_answers_of_a_model_quantized_while_loading(type_, quantized, toy_native):
    in_memory = TransformersEngine.load(
        toy_native, EngineOptions(device="cpu", dtype="float32", load_in=FOLDER_QUANTIZATIONS[type_])
    )
    assert run_in_new_process(quantized(type_), "float32")[0] == list(in_memory.generate(PROMPT, GREEDY))


@pytest.mark.parametrize("type_", FOLDER_QUANTIZATIONS)
def test_the_manifest_covers_every_file_and_names_type_and_source(type_, quantized, toy_native):
    checkpoint = open_native(quantized(type_), verify=True, quantized=True)
    origin = read_manifest(quantized(type_))["provenance"]
    assert checkpoint.load_in == FOLDER_QUANTIZATIONS[type_]
    assert (origin["made_by"], origin["type"], origin["source"]) == ("glm quantize", type_, toy_native.name)
    assert checkpoint.files.nbytes == pytest.approx(
        quantized_weight_bytes(checkpoint.model_config, checkpoint.load_in, 2), rel=0.02
    )
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in quantized(type_).glob("*.safetensors"))


@pytest.fixture(scope="module")
def full_peak(larger) -> int:
    """Kilobytes that loading `larger` in bfloat16 takes."""
    return run_in_new_process(larger, "bfloat16")[1]


@pytest.mark.slow
@pytest.mark.parametrize("type_", FOLDER_QUANTIZATIONS)
def test_loading_never_takes_the_memory_of_the_full_model(type_, larger, full_peak, tmp_path):
    """No 16-bit copy of the weights is read on the way."""
    size, found = quantize_folder(larger, tmp_path / type_, type_)
    assert size < 0.7 * (larger / "model.safetensors").stat().st_size
    assert 0 <= found.mean_kl <= divergence.MAX_MEAN_KL[type_]
    assert run_in_new_process(tmp_path / type_, "bfloat16")[1] < 0.75 * full_peak


@pytest.mark.parametrize("what", ["convert", "export", "gguf", "folder", "vllm"])
def test_it_is_rejected_for_all_but_inference(what, quantized, tmp_path, monkeypatch):
    """Its weights have lost precision: converting, merging or quantizing them again would hide that."""
    from entrypoints.quantization.to_gguf import QuantizeOptions, quantize
    from entrypoints.training.result.export import ExportOptions, export

    ways = {
        "convert": lambda folder, target: convert_to_original(folder, target, "keep", False),
        "export": lambda folder, target: export(folder, target, ExportOptions()),
        "gguf": lambda folder, target: quantize(QuantizeOptions(folder, target.with_suffix(".gguf"), "q4_0")),
        "folder": lambda folder, target: quantize_folder(folder, target, "int8"),
        "vllm": lambda folder, target: check_engine_options(folder, EngineOptions(engine="vllm")),
    }
    monkeypatch.setitem(ENGINE_PACKAGES, "vllm", "torch")  # as if it were there
    with pytest.raises(UserError, match=r"is already quantized: inference only.*use the checkpoint"):
        ways[what](quantized("int8"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("adapters", "load_in", "installed", "message"),
    [
        ({"mine": Path("x")}, None, True, "a quantized folder, does not support --adapter; merge a LoRA first"),
        ({}, "4bit", True, "is already quantized to 8 bits; omit --load-in"),
        ({}, None, False, "needs the package bitsandbytes"),
    ],
)
def test_unsupported_options_are_rejected_before_loading(adapters, load_in, installed, message, quantized, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" and not installed else find(name)
    )
    with pytest.raises(UserError, match=message):
        check_engine_options(quantized("int8"), EngineOptions(adapters=adapters, load_in=load_in))


def test_missing_quantization_scales_are_named(quantized, tmp_path):
    for type_, name in (("int8", "mlp.down_proj.SCB"), ("nf4", "mlp.down_proj.weight.absmax")):
        folder = shutil.copytree(quantized(type_), tmp_path / type_)
        (folder / "manifest.json").unlink()
        weights = load_file(folder / "model.safetensors")
        del weights[f"model.layers.1.{name}"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=rf"missing: model\.layers\.1\.{name}"):
            open_native(folder, quantized=True)


@pytest.mark.parametrize("way", [{"quant_method": "gptq", "bits": 4}, {"load_in_4bit": True}, "int8"])
def test_a_quantization_by_another_program_is_rejected(way, toy_native, tmp_path):
    folder = shutil.copytree(toy_native, tmp_path / "native")
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": way}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"has an unsupported quantization_config; supported are the int8, nf4 folders"):
        open_native(folder, quantized=True)


def test_a_folder_above_the_divergence_limit_is_not_kept(toy_native, tmp_path, monkeypatch):
    monkeypatch.setitem(divergence.MAX_MEAN_KL, "int8", 1e-9)
    with pytest.raises(UserError, match="the int8 model differs too much from its source: mean KL"):
        quantize_folder(toy_native, tmp_path / "out", "int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("device", ["mps", "old driver"])
def test_it_is_validated_on_the_cpu_whatever_gpu_there_is(device, toy_native, tmp_path, monkeypatch):
    """The work is done by then; a GPU that cannot load the folder must not discard it."""
    if device == "mps":
        monkeypatch.setattr(placement, "_device_type", lambda asked: "mps" if asked == "auto" else asked)
    else:
        monkeypatch.setattr(placement, "check_driver", lambda: pytest.fail("queried the driver"))
    _, found = quantize_folder(toy_native, tmp_path / "out", "nf4")
    assert 0 <= found.mean_kl <= divergence.MAX_MEAN_KL["nf4"]


def test_the_float32_memory_of_the_validation_is_checked_first(toy_native, tmp_path, monkeypatch):
    """On a CPU without bfloat16 embedding and output layer take twice the memory, more than the quantizer needs."""
    shape = open_native(toy_native).model_config
    monkeypatch.setattr(to_bitsandbytes, "cpu_has_native_bf16", lambda: False)
    monkeypatch.setattr(to_bitsandbytes, "quantization_workspace_bytes", lambda shape: 0)
    monkeypatch.setattr(to_bitsandbytes, "available_memory", lambda: quantized_weight_bytes(shape, "8bit", 4))
    with pytest.raises(UserError, match=r"quantizing .* to int8 needs"):
        quantize_folder(toy_native, tmp_path / "out", "int8")


def test_too_little_memory_is_reported_before_weights_are_read(toy_native, tmp_path, monkeypatch):
    monkeypatch.setattr("entrypoints.quantization.to_bitsandbytes.available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"to nf4 needs \S+ [kM]B of memory, .* are available"):
        quantize_folder(toy_native, tmp_path / "out", "nf4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("type_", FOLDER_QUANTIZATIONS)
def test_on_a_gpu_it_gives_the_answers_of_a_model_quantized_there(type_, quantized, toy_native):
    in_memory = TransformersEngine.load(toy_native, EngineOptions(device="cuda", load_in=FOLDER_QUANTIZATIONS[type_]))
    stored = TransformersEngine.load(quantized(type_), EngineOptions(device="cuda"))
    assert list(stored.generate(PROMPT, GREEDY)) == list(in_memory.generate(PROMPT, GREEDY))


@pytest.fixture(scope="module", params=["chatglm2", "glm4"])
def of_family(request, sample_rows, tmp_path_factory) -> Path:
    """The untrained demo model of another family, converted."""
    folder = tmp_path_factory.mktemp(request.param)
    texts = [row[column] for row in sample_rows for column in ("content", "summary")]
    write_demo_model(folder / "original", texts, family=FAMILIES[request.param])
    convert_to_native(folder / "original", folder / "native", PromptFormat.of(FAMILIES[request.param]))
    return folder / "native"


@pytest.mark.slow
@pytest.mark.parametrize("type_", FOLDER_QUANTIZATIONS)
def test_a_folder_of_another_family_keeps_its_format_and_answers(type_, of_family, tmp_path):
    _, found = quantize_folder(of_family, tmp_path / type_, type_)
    assert 0 <= found.mean_kl <= divergence.MAX_MEAN_KL[type_]
    before, engine = (
        TransformersEngine.load(folder, EngineOptions(device="cpu", dtype="float32"))
        for folder in (of_family, tmp_path / type_)
    )
    messages = [Message("user", "你好，今天穿什么？")]
    prompts = [each.prompt_format.encode(messages, each.tokenizer) for each in (before, engine)]
    assert prompts[0] == prompts[1]
    answer = list(map(int, engine.generate(prompts[1], GREEDY)))
    assert len(answer) == GREEDY.max_new_tokens
    assert engine.tokenizer.stop_ids == before.tokenizer.stop_ids
