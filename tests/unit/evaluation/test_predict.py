"""Predictions: batching, the prompt format of training, and files that keep every answer."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from entrypoints.chat_format.answer_parser import parse_answer
from entrypoints.chat_format.prompt import Message, PromptFormat
from entrypoints.chat_format.sampling import Sampling
from entrypoints.dataset.reader import Example
from entrypoints.errors import UserError
from entrypoints.evaluation import metrics
from entrypoints.evaluation.predict import PREDICTIONS_FILE, SCORES_FILE, Prediction, evaluate, predict

GREEDY = Sampling(temperature=0, max_new_tokens=6)


@pytest.fixture
def rows(sample_rows):
    """Seven rows of different lengths in the order of a file, the third and the fifth skipped when it was read."""
    chosen = random.Random(0).sample(sample_rows, 7)
    numbers = [0, 1, 3, 5, 6, 7, 8]
    return [
        Example(Path("dev.json"), number + 1, number, row["content"], row["summary"])
        for number, row in zip(numbers, chosen, strict=True)
    ]


@pytest.fixture
def received(toy_engine, monkeypatch):
    """Every prompt that the engine receives."""
    prompts, generate_batch = [], toy_engine.generate_batch

    def recording(batch, sampling):
        prompts.extend(batch)
        return generate_batch(batch, sampling)

    monkeypatch.setattr(toy_engine, "generate_batch", recording)
    return prompts


def lines(folder):
    return [json.loads(line) for line in (folder / PREDICTIONS_FILE).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_each_row_gets_one_answer_independent_of_its_batch(batch_size, rows, toy_engine):
    """Padding must not change an answer."""
    found = sorted(predict(toy_engine, rows, GREEDY, 512, batch_size), key=lambda prediction: prediction.index)
    assert [(one.index, one.line, one.prompt, one.reference) for one in found] == [
        (row.index, row.line, row.prompt, row.response) for row in rows
    ]
    for one in found:
        prompt = toy_engine.prompt_format.encode([Message("user", one.prompt)], toy_engine.tokenizer)
        assert one.prediction == parse_answer(toy_engine.generate(prompt, GREEDY), toy_engine.tokenizer).content


@pytest.mark.parametrize("prompt_format", [PromptFormat(), PromptFormat("round", "写广告：")])
def test_prompts_are_encoded_as_in_training(prompt_format, rows, toy_engine, received, monkeypatch):
    """With history, source prefix and truncation."""
    monkeypatch.setattr(toy_engine, "prompt_format", prompt_format)
    rows = [replace(row, history=[("你好", "您好")]) for row in rows]
    assert len(list(predict(toy_engine, rows, GREEDY, 40, 4))) == 7
    trained = []
    for row in rows:
        turns = [("你好", "您好"), Message("user", row.prompt), Message("assistant", row.response)]
        trained.append(prompt_format.encode_for_training(turns, toy_engine.tokenizer, 40, 99))
    assert any(row.source_truncated for row in trained)
    assert all(any(row.ids[: len(prompt)] == prompt for row in trained) for prompt in received)


def test_a_prompt_that_fills_the_context_is_reported_before_the_first_answer(rows, toy_engine, received, monkeypatch):
    monkeypatch.setattr(toy_engine, "context_length", 20)
    with pytest.raises(UserError, match=r"the context length is 20; lower --max-source-length"):
        list(predict(toy_engine, rows, GREEDY, 512, 2))
    assert received == []


PREDICTIONS = [
    Prediction(number, number + 1, "问", "今天天气很好", text) for number, text in [(5, "今天"), (2, ""), (9, "好")]
]


def test_each_prediction_is_on_disk_before_the_next_one_is_generated(tmp_path):
    """A later failure loses no answer."""

    def breaking():
        for number, prediction in enumerate(PREDICTIONS):
            yield prediction
            assert len(lines(tmp_path)) == number + 1
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        evaluate(breaking(), tmp_path)
    assert [line["index"] for line in lines(tmp_path)] == [5, 2, 9]


def test_the_final_file_is_in_row_order_and_the_scores_are_written(tmp_path):
    scores = evaluate(PREDICTIONS, tmp_path / "new" / "folder")
    assert [line["index"] for line in lines(tmp_path / "new" / "folder")] == [2, 5, 9]
    expected = metrics.score(["", "今天", "好"], ["今天天气很好"] * 3)
    assert scores == {**expected.as_dict(), "n_skipped": 0}
    assert json.loads((tmp_path / "new" / "folder" / SCORES_FILE).read_text(encoding="utf-8")) == scores


def test_a_lone_surrogate_in_a_row_can_be_written(tmp_path):
    """JSON allows half an emoji, UTF-8 does not."""
    evaluate([Prediction(0, 1, "问\ud83d", "好", "好")], tmp_path)
    assert lines(tmp_path)[0]["prompt"] == "问\ud83d"


def test_a_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create --output-dir"):
        evaluate([], tmp_path / "file" / "out")
