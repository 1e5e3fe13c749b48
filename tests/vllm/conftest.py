"""Checkpoints for the tests of vLLM, and the answers of transformers for them."""

import json
import shutil
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from reference import reference_answers
from safetensors.torch import load_file, save_file

from entrypoints.checkpoint.adapter_config import CONFIG_FILE
from entrypoints.checkpoint.adapters import LORA_FILE, PREFIX_FILE
from entrypoints.checkpoint.layout import ModelConfig, tensor_mappings
from entrypoints.checkpoint.manifest import MANIFEST_FILE
from entrypoints.checkpoint.tokenizer import load_tokenizer
from entrypoints.demo.model import MODEL_CONFIG
from entrypoints.engines.base import Engine
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine

RANK = 6  # not one of vLLM's values of max_lora_rank
OUTPUT_WEIGHT = "lm_head.weight"


IS_INSTALLED = find_spec("vllm") is not None
VLLM_WARNINGS = (
    (".*torch.distributed.reduce_op.*", FutureWarning),  # at import
    ("Unclosed context <zmq.*", ResourceWarning),  # when its client is garbage-collected, possibly after the test
)


def pytest_configure(config: pytest.Config) -> None:
    """Ignore the warnings of vLLM itself, during the tests and after the last one."""
    for message, category in VLLM_WARNINGS if IS_INSTALLED else ():
        config.addinivalue_line("filterwarnings", f"ignore:{message}:{category.__name__}")
        warnings.filterwarnings("ignore", message, category)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip these tests if vLLM is not installed; does not import it."""
    for item in items:
        if Path(__file__).parent in item.path.parents and not IS_INSTALLED:
            item.add_marker(pytest.mark.skip(reason="vllm is not installed: make test-vllm"))


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """20 prompts of 2 to 300 ids, without special tokens."""
    generator = torch.Generator().manual_seed(7)
    lengths = [2, 3, 5, 8, 13, 21, 34, 55, 89, 127, 128, 129, 144, 160, 200, 255, 256, 257, 299, 300]
    return [torch.randint(300, 2300, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="session")
def toy(toy_native: Path, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with the output rows of its most frequent id and a stop id swapped, so that some answers end."""
    folder = tmp_path_factory.mktemp("vllm") / "toy"
    shutil.copytree(toy_native, folder)
    (folder / MANIFEST_FILE).unlink()
    answers = reference_answers(toy_native, prompts)
    later = [id_ for answer in answers for id_ in set(answer[4:]) - set(answer[:4])]
    frequent, stop = max(set(later), key=later.count), load_tokenizer(folder).stop_ids[-1]
    (file,) = [file for file in folder.glob("*.safetensors") if OUTPUT_WEIGHT in load_file(file)]
    weights = load_file(file)
    weights[OUTPUT_WEIGHT][[frequent, stop]] = weights[OUTPUT_WEIGHT][[stop, frequent]]
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def reference(toy: Path) -> TransformersEngine:
    return TransformersEngine.load(toy, EngineOptions(device="cpu", dtype="float32"))


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA on every linear layer of the tiny model, large enough to change each answer."""
    folder = tmp_path_factory.mktemp("vllm") / "lora"
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    data = {}
    for name, (rows, columns) in linear_layers(MODEL_CONFIG).items():
        data[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * 0.05
        data[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.05
    save_file(data, folder / LORA_FILE, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "inference_mode": True,
        "r": RANK,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "target_modules": sorted({name.rpartition(".")[2] for name in linear_layers(MODEL_CONFIG)}),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return folder


def linear_layers(model_config: ModelConfig) -> dict[str, tuple[int, int]]:
    sizes = {name: size for entry in tensor_mappings(model_config) for name, size in entry.native_shapes().items()}
    return {
        name.removesuffix(".weight"): size
        for name, size in sizes.items()
        if ".layers." in name and name.endswith("weight") and len(size) == 2
    }


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A P-Tuning v2 adapter for the tiny model."""
    folder = tmp_path_factory.mktemp("vllm") / "prefix"
    folder.mkdir()
    save_file(
        {"prefix": torch.zeros(MODEL_CONFIG.num_layers * 2, MODEL_CONFIG.num_kv_heads, 4, MODEL_CONFIG.head_dim)},
        folder / PREFIX_FILE,
    )
    (folder / CONFIG_FILE).write_text(json.dumps({"adapter_type": "ptuning-v2", "pre_seq_len": 4}))
    return folder


@pytest.fixture(scope="module")
def engine(toy: Path, lora: Path) -> Iterator[Engine]:
    """The tiny model in vLLM with one adapter, in float32, so that transformers computes the same."""
    from entrypoints.engines.vllm.engine import VllmEngine

    engine = VllmEngine.load(toy, EngineOptions(adapters={"tuned": lora}, slots=4, dtype="float32"))
    yield engine
    engine.close()
