"""The same command gives the same run, and the batch size changes neither the loss nor its evaluation."""

import json

import pytest
import torch
from safetensors.torch import load_file

from entrypoints.chat_format.prompt import IGNORE_INDEX
from entrypoints.dataset.columns import Columns
from entrypoints.dataset.reader import examples, read_rows
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.training.methods import ptuning

METHODS = {
    "full": {"neftune_noise_alpha": 5.0},
    "freeze": {},
    "lora": {"lora_target": "all-linear"},
    "ptuning": {"learning_rate": 1e-2},
    "ptuning with MLP": {"method": "ptuning", "prefix_projection": True},
    "packed": {"method": "full", "packing": True, "max_source_length": 40, "max_target_length": 40},
}


def fields_of(name):
    return {"method": name, **METHODS[name]}


def weights_of(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_equal_commands_give_bit_equal_losses_and_weights(name, tune, logged, tmp_path):
    """The state of the generators before a run does not matter: another command may have used them."""
    runs = []
    for number in range(2):
        torch.manual_seed(number)
        runs.append(tune(tmp_path / f"{number}", max_steps=2, save_steps=9, **fields_of(name)))
    assert logged(runs[0]) == logged(runs[1])
    first, second = map(weights_of, runs)
    assert first
    assert all(torch.equal(first[tensor], second[tensor]) for tensor in first)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "ptuning"])
def test_another_seed_gives_other_initial_weights(method, tune, tmp_path):
    """With hardly any learning rate the result is the initial weights."""
    found = [
        weights_of(tune(tmp_path / f"{seed}", method=method, seed=seed, max_steps=1, learning_rate=1e-30))
        for seed in (1, 2)
    ]
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name != "packed"])
def test_accumulated_batches_give_the_losses_of_one_batch(name, tune, logged, tmp_path, monkeypatch):
    """Without dropout, whose random numbers depend on the shape of a batch."""
    monkeypatch.setattr(ptuning, "PREFIX_DROPOUT", 0.0)
    fields = {**fields_of(name), "lora_dropout": 0.0, "neftune_noise_alpha": None, "max_steps": 3, "save_steps": 9}
    whole = tune(tmp_path / "whole", per_device_train_batch_size=4, **fields)
    parts = tune(tmp_path / "parts", per_device_train_batch_size=1, gradient_accumulation_steps=4, **fields)
    assert logged(parts) == pytest.approx(logged(whole), rel=2e-5)


def mean_loss(toy_native, file):
    """The mean over all labels, row by row, with torch's own cross entropy."""
    engine = TransformersEngine.load(toy_native, EngineOptions(device="cpu", dtype="float32"))
    rows, _ = examples(read_rows(file, "utf-8"), Columns())
    total, labels = 0.0, 0
    for row in rows:
        encoded = engine.prompt_format.encode_for_training(row.messages(), engine.tokenizer, 512, 512)
        with torch.inference_mode():
            logits = engine.model(input_ids=torch.tensor([encoded.ids])).logits[0, :-1]
        wanted = torch.tensor(encoded.labels[1:])
        total += torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORE_INDEX, reduction="sum").item()
        labels += int((wanted != IGNORE_INDEX).sum())
    return total / labels


@pytest.mark.slow
def test_the_evaluation_loss_is_the_mean_over_labels_whatever_the_batch_size(tune, toy_native, sample_rows, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [
        {"content": row["content"], "summary": row["summary"][: 5 + 9 * i]} for i, row in enumerate(sample_rows[:7])
    ]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    expected = mean_loss(toy_native, file)
    for method, size in (("lora", 1), ("lora", 2), ("full", 3), ("ptuning", 7)):
        fields = {"method": method, "validation_file": file, "per_device_eval_batch_size": size}
        output = tune(tmp_path / f"{method}-{size}", max_steps=1, **fields)
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        found = next(event["eval_loss"] for event in history if "eval_loss" in event and event["step"] == 0)
        if method == "ptuning":  # a random prefix changes the loss; other sizes must not
            again = tune(tmp_path / "again", max_steps=1, **fields | {"per_device_eval_batch_size": 2})
            history = json.loads((again / "trainer_state.json").read_text())["log_history"]
            assert history[0]["eval_loss"] == pytest.approx(found, rel=1e-5)
        else:
            assert found == pytest.approx(expected, rel=1e-5)
