"""vLLM with demo models of the related families, whose rotary embeddings differ, compared with transformers."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from reference import greedy, reference_answers

from entrypoints.chat_format.prompt import Message
from entrypoints.checkpoint.conversion import convert_to_native, original_format
from entrypoints.demo.model import write_demo_model
from entrypoints.engines.base import Engine
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.vllm.engine import VllmEngine
from entrypoints.families import FAMILIES

RATIOS = {"chatglm2": 4, "glm4": 500}  # rope_ratio, which divides positions or multiplies the base


@pytest.fixture(scope="module", params=RATIOS)
def case(request, sample_rows, tmp_path_factory) -> Iterator[tuple[Path, Engine]]:
    folder, family = tmp_path_factory.mktemp("families"), FAMILIES[request.param]
    texts = [row[column] for row in sample_rows for column in ("content", "summary")]
    write_demo_model(folder / "original", texts, family=family)
    config = json.loads((folder / "original" / "config.json").read_text()) | {"rope_ratio": RATIOS[family.name]}
    (folder / "original" / "config.json").write_text(json.dumps(config))
    convert_to_native(folder / "original", folder / "native", original_format(folder / "original"))
    engine = VllmEngine.load(folder / "native", EngineOptions(slots=2, dtype="float32"))
    yield folder / "native", engine
    engine.close()


def test_greedy_answers_are_those_of_transformers(case, prompts):
    folder, engine = case
    chosen = prompts[3:20:4]
    assert len(chosen) == 5
    assert [list(engine.generate(prompt, greedy())) for prompt in chosen] == reference_answers(folder, chosen)


def test_a_conversation_in_the_familys_own_format_is_answered(case):
    _, engine = case
    prompt = engine.prompt_format.encode([Message("user", "你好")], engine.tokenizer)
    answer = list(engine.generate(prompt, greedy()))
    assert answer
    assert not set(engine.tokenizer.stop_ids) & set(answer)
