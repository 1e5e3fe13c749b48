"""Checkpoints for vLLM's tests, and the answers that transformers gives on them in the same process."""

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

from entrypoints.checkpoint.adapters import CONFIG_FILE, LORA_FILE, PREFIX_FILE
from entrypoints.checkpoint.layout import Shape, tensors
from entrypoints.checkpoint.manifest import MANIFEST_FILE
from entrypoints.checkpoint.tokenizer import load_tokenizer
from entrypoints.demo.model import SHAPE
from entrypoints.engines.base import Engine
from entrypoints.engines.transformers_engine import TransformersEngine

RANK = 6  # none of the ranks that vLLM makes room for
STOPPING_ROW = "lm_head.weight"


IS_HERE = find_spec("vllm") is not None
VLLMS_OWN_WARNINGS = (
    (".*torch.distributed.reduce_op.*", FutureWarning),  # at import
    ("Unclosed context <zmq.*", ResourceWarning),  # when its client is collected, perhaps long after the test
)


def pytest_configure(config: pytest.Config) -> None:
    """Leave vLLM's own warnings alone, inside the tests and after the last one."""
    for message, category in VLLMS_OWN_WARNINGS if IS_HERE else ():
        config.addinivalue_line("filterwarnings", f"ignore:{message}:{category.__name__}")
        warnings.filterwarnings("ignore", message, category)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whether vLLM is installed is known without importing it."""
    for item in items:
        if Path(__file__).parent in item.path.parents and not IS_HERE:
            item.add_marker(pytest.mark.skip(reason="vllm is not installed here: make test-vllm"))


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """20 prompts of 2 to 300 ids, none of them a control token."""
    generator = torch.Generator().manual_seed(7)
    lengths = [2, 3, 5, 8, 13, 21, 34, 55, 89, 127, 128, 129, 144, 160, 200, 255, 256, 257, 299, 300]
    return [torch.randint(300, 2300, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="session")
def toy(toy_native: Path, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with the output rows of its most usual id and of a stop id swapped, so that some answers end."""
    folder = tmp_path_factory.mktemp("vllm") / "toy"
    shutil.copytree(toy_native, folder)
    (folder / MANIFEST_FILE).unlink()
    answers = reference_answers(toy_native, prompts)
    later = [id_ for answer in answers for id_ in set(answer[4:]) - set(answer[:4])]
    usual, stop = max(set(later), key=later.count), load_tokenizer(folder).stop_ids[-1]
    (file,) = [file for file in folder.glob("*.safetensors") if STOPPING_ROW in load_file(file)]
    weights = load_file(file)
    weights[STOPPING_ROW][[usual, stop]] = weights[STOPPING_ROW][[stop, usual]]
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def reference(toy: Path) -> TransformersEngine:
    return TransformersEngine.load(toy, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA on every linear layer of the toy, strong enough to change each answer."""
    folder = tmp_path_factory.mktemp("vllm") / "lora"
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    data = {}
    for name, (rows, columns) in linear_layers(SHAPE).items():
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
        "target_modules": sorted({name.rpartition(".")[2] for name in linear_layers(SHAPE)}),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return folder


def linear_layers(shape: Shape) -> dict[str, tuple[int, int]]:
    sizes = {name: size for entry in tensors(shape) for name, size in entry.native_shapes().items()}
    return {
        name.removesuffix(".weight"): size
        for name, size in sizes.items()
        if ".layers." in name and name.endswith("weight") and len(size) == 2
    }


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A P-Tuning v2 adapter for the toy."""
    folder = tmp_path_factory.mktemp("vllm") / "prefix"
    folder.mkdir()
    save_file({"prefix": torch.zeros(SHAPE.layers * 2, SHAPE.groups, 4, SHAPE.head_dim)}, folder / PREFIX_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps({"adapter_type": "ptuning-v2", "pre_seq_len": 4}))
    return folder


@pytest.fixture(scope="module")
def engine(toy: Path, lora: Path) -> Iterator[Engine]:
    """The toy in vLLM with one adapter, in float32, so that transformers computes the same."""
    from entrypoints.engines.vllm_engine import VllmEngine

    engine = VllmEngine.load(toy, {"tuned": lora}, slots=4, dtype="float32")
    yield engine
    engine.close()
