"""--eval-samples: answers to validation rows at each evaluation."""

import json

import pytest

from entrypoints.chat_format.answer_parser import decode
from entrypoints.chat_format.prompt import Message
from entrypoints.chat_format.sampling import Sampling
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.errors import UserError
from entrypoints.training.arguments import TrainArguments


def samples(folder):
    text = (folder / "evaluation_samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "ptuning"])
def test_the_answers_of_the_last_step_are_those_of_the_finished_model(method, tune, toy_native, sample_file, tmp_path):
    folder = tune(
        tmp_path / "out", method=method, validation_file=sample_file, eval_samples=2, eval_steps=3, max_target_length=24
    )
    found = samples(folder)
    assert [sample["step"] for sample in found] == [0, 0, 3, 3, 6, 6]
    rows = [json.loads(line) for line in sample_file.read_text(encoding="utf-8").splitlines()[:2]]
    assert [sample["prompt"] for sample in found[-2:]] == [row["content"] for row in rows]
    assert rows[0]["summary"].startswith(found[0]["reference"][:10])
    engine = TransformersEngine.load(toy_native, EngineOptions(adapter=folder, device="cpu", dtype="float32"))
    for sample in found[-2:]:
        prompt = engine.prompt_format.encode([Message("user", sample["prompt"])], engine.tokenizer)
        ids = list(engine.generate(prompt, Sampling(max_new_tokens=24, temperature=0)))
        assert sample["prediction"] == decode(ids, engine.tokenizer).strip()


def test_answers_need_validation_rows(sample_file, tmp_path):
    with pytest.raises(UserError, match="--eval-samples needs --validation-file FILE"):
        TrainArguments(tmp_path / "base", sample_file, tmp_path / "out", eval_samples=2)
    with pytest.raises(UserError, match="--eval-samples 0 is below 1"):
        TrainArguments(tmp_path / "base", sample_file, tmp_path / "out", sample_file, eval_samples=0)
