"""Trap names (C5, F8, H1) are those of the list of reported pains."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from entrypoints import scoring
from entrypoints.answer import read_answer
from entrypoints.dataset.reading import Example
from entrypoints.errors import UserError
from entrypoints.evaluation import PREDICTIONS_FILE, SCORES_FILE, Prediction, evaluate, predict
from entrypoints.prompt import Message, PromptFormat
from entrypoints.sampling import Sampling

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
def asked(toy_engine, monkeypatch):
    """Every prompt that the engine gets."""
    prompts, generate_batch = [], toy_engine.generate_batch

    def recording(batch, sampling):
        prompts.extend(batch)
        return generate_batch(batch, sampling)

    monkeypatch.setattr(toy_engine, "generate_batch", recording)
    return prompts


def lines(folder):
    return [json.loads(line) for line in (folder / PREDICTIONS_FILE).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_each_row_is_answered_once_and_as_if_alone_whatever_the_batch(batch_size, rows, toy_engine):
    """C5."""
    found = sorted(predict(toy_engine, rows, GREEDY, 512, batch_size), key=lambda prediction: prediction.index)
    assert [(one.index, one.line, one.prompt, one.reference) for one in found] == [
        (row.index, row.line, row.prompt, row.response) for row in rows
    ]
    for one in found:
        prompt = toy_engine.prompt_format.encode([Message("user", one.prompt)], toy_engine.tokenizer)
        assert one.prediction == read_answer(toy_engine.generate(prompt, GREEDY), toy_engine.tokenizer).content


@pytest.mark.parametrize("prompt_format", [PromptFormat(), PromptFormat("round", "写广告：")])
def test_rows_are_asked_as_they_were_trained(prompt_format, rows, toy_engine, asked, monkeypatch):
    """F8: history, prefix and cut included."""
    monkeypatch.setattr(toy_engine, "prompt_format", prompt_format)
    rows = [replace(row, history=[("你好", "您好")]) for row in rows]
    assert len(list(predict(toy_engine, rows, GREEDY, 40, 4))) == 7
    trained = []
    for row in rows:
        turns = [("你好", "您好"), Message("user", row.prompt), Message("assistant", row.response)]
        trained.append(prompt_format.encode_for_training(turns, toy_engine.tokenizer, 40, 99))
    assert any(row.source_cut for row in trained)
    assert all(any(row.ids[: len(prompt)] == prompt for row in trained) for prompt in asked)


def test_a_prompt_over_the_window_is_told_before_the_first_answer(rows, toy_engine, asked, monkeypatch):
    monkeypatch.setattr(toy_engine, "window", 20)
    with pytest.raises(UserError, match=r"the model's window is 20; lower --max-source-length"):
        list(predict(toy_engine, rows, GREEDY, 512, 2))
    assert asked == []


PREDICTIONS = [
    Prediction(number, number + 1, "问", "今天天气很好", text) for number, text in [(5, "今天"), (2, ""), (9, "好")]
]


def test_answers_are_on_disk_before_the_next_one_is_asked_for(tmp_path):
    """H1: what breaks later loses nothing."""

    def breaking():
        for number, prediction in enumerate(PREDICTIONS):
            yield prediction
            assert len(lines(tmp_path)) == number + 1
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        evaluate(breaking(), tmp_path)
    assert [line["index"] for line in lines(tmp_path)] == [5, 2, 9]


def test_the_finished_file_is_in_the_files_order_and_the_scores_are_those_of_scoring(tmp_path):
    scores = evaluate(PREDICTIONS, tmp_path / "new" / "folder")
    assert [line["index"] for line in lines(tmp_path / "new" / "folder")] == [2, 5, 9]
    assert scores == scoring.score(["", "今天", "好"], ["今天天气很好"] * 3)
    assert json.loads((tmp_path / "new" / "folder" / SCORES_FILE).read_text(encoding="utf-8")) == scores.as_dict()


def test_half_an_emoji_in_a_row_does_not_break_the_file(tmp_path):
    """JSON can hold one, UTF-8 cannot."""
    evaluate([Prediction(0, 1, "问\ud83d", "好", "好")], tmp_path)
    assert lines(tmp_path)[0]["prompt"] == "问\ud83d"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make --output-dir"):
        evaluate([], tmp_path / "file" / "out")
