"""Models in llama.cpp, loaded once a session where nothing is changed."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from safetensors.torch import save_file

from entrypoints.checkpoint.gguf_writing import write_gguf
from entrypoints.checkpoint.tokenizer import Tokenizer
from entrypoints.engines.llamacpp_engine import LlamaCppEngine
from entrypoints.prompt import PromptFormat


@pytest.fixture(scope="session")
def llama(toy_gguf: Path) -> Iterator[LlamaCppEngine]:
    """The untrained toy with two slots."""
    engine = LlamaCppEngine.load(toy_gguf, slots=2, threads=1)
    yield engine
    engine.close()


@pytest.fixture
def scripted_llama(scripted: Callable, toy_native: Path, tmp_path: Path) -> Iterator[Callable]:
    """As `scripted`, in llama.cpp: an engine of one slot that says the given ids."""
    engines = []

    def make(script: Sequence[int], **options) -> LlamaCppEngine:
        folder = tmp_path / f"scripted-{len(engines)}"
        shutil.copytree(toy_native, folder)
        (folder / "manifest.json").unlink()
        weights = {name: tensor.contiguous() for name, tensor in scripted(script).model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        write_gguf(folder, folder / "model.gguf", "f16")
        engines.append(LlamaCppEngine.load(folder / "model.gguf", slots=1, threads=2, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session")
def prompts(toy_tokenizer: Tokenizer, sample_rows: list[dict]) -> list[list[int]]:
    """Six questions as ids."""
    questions = ["你好", *(row["content"] for row in sample_rows[:5])]
    return [PromptFormat().encode([{"role": "user", "content": text}], toy_tokenizer) for text in questions]
