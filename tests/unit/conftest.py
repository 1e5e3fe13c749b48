"""Engines with the tiny model, loaded once per session."""

import copy
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.checkpoint.prompt_file import read_prompt_format
from entrypoints.checkpoint.tokenizer import Tokenizer, load_tokenizer
from entrypoints.engines.llamacpp.engine import LlamaCppEngine
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.quantization.gguf_writer import write_gguf

Scripted = Callable[..., TransformersEngine]


@pytest.fixture(scope="session")
def toy_tokenizer(toy_native: Path) -> Tokenizer:
    return load_tokenizer(toy_native)


@pytest.fixture(scope="session")
def toy_engine(toy_native: Path) -> TransformersEngine:
    """The untrained tiny model in float32, which every machine computes alike."""
    return TransformersEngine.load(toy_native, EngineOptions(device="cpu", dtype="float32"))


@pytest.fixture(scope="session")
def scripted(toy_native: Path, toy_engine: TransformersEngine) -> Scripted:
    """Creates an engine whose weights generate the given ids after <|assistant|>, for any prompt.

    The layers add nothing, so the hidden state is the embedding of the last id, and the output layer maps each id of
    the script to the next one: no id may occur twice.
    """

    def make(script: Sequence[int], context_length: int = toy_engine.context_length) -> TransformersEngine:
        model = copy.deepcopy(toy_engine.model)
        path = [toy_engine.tokenizer.special_token_id("<|assistant|>"), *script]
        assert len(set(path)) == len(path), "an id occurs twice in the script"
        embedding = torch.nn.functional.normalize(model.get_input_embeddings().weight, dim=-1)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            model.lm_head.weight.zero_()
            for id_, following in itertools.pairwise(path):
                model.lm_head.weight[following] = 5 * embedding[id_]
        return TransformersEngine(model, toy_engine.tokenizer, read_prompt_format(toy_native), context_length)

    return make


@pytest.fixture(scope="session")
def llama(toy_gguf: Path) -> Iterator[LlamaCppEngine]:
    """The untrained tiny model with two slots."""
    engine = LlamaCppEngine.load(toy_gguf, EngineOptions(slots=2, threads=1))
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def scripted_llama(
    scripted: Scripted, toy_native: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., LlamaCppEngine]]:
    """As `scripted`, in llama.cpp with one slot; the same script and options give the same engine."""
    parent = tmp_path_factory.mktemp("scripted")
    engines: dict[tuple, LlamaCppEngine] = {}

    def make(script: Sequence[int], **options) -> LlamaCppEngine:
        key = (tuple(script), tuple(sorted(options.items())))
        if key not in engines:
            folder = parent / f"{len(engines)}"
            shutil.copytree(toy_native, folder)
            (folder / "manifest.json").unlink()
            weights = {name: tensor.contiguous() for name, tensor in scripted(script).model.state_dict().items()}
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            write_gguf(folder, folder / "model.gguf", "f16")
            engines[key] = LlamaCppEngine.load(folder / "model.gguf", EngineOptions(threads=1, **options))
        return engines[key]

    yield make
    for engine in engines.values():
        engine.close()


@pytest.fixture(scope="session")
def prompts(toy_tokenizer: Tokenizer, sample_rows: list[dict]) -> list[list[int]]:
    """Six questions as token ids."""
    questions = ["你好", *(row["content"] for row in sample_rows[:5])]
    return [PromptFormat().encode([{"role": "user", "content": text}], toy_tokenizer) for text in questions]
