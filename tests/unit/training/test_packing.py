"""Packed rows: the same loss, and nothing of one row reaches another."""

import datasets
import pytest
import torch

from entrypoints.errors import UserError
from entrypoints.prompt import IGNORED
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.batches import Collator
from entrypoints.training.packing import packed


@pytest.fixture(scope="module")
def rows():
    """12 rows of 5 to 38 ids; the first third of each is prompt."""
    made = []
    for number in range(12):
        length = 5 + 3 * number
        ids = [300 + (7 * number + place) % 900 for place in range(length)]
        labels = [IGNORED] * (length // 3) + ids[length // 3 :]
        made.append({"input_ids": ids, "labels": labels, "length": length})
    return datasets.Dataset.from_list(made)


def test_packs_hold_every_row_once_and_whole(rows):
    packs = packed(rows, 64)
    assert max(packs["length"]) <= 64
    assert len(packs) == 5  # 258 ids in rooms of 64: no fewer would do
    assert sum(packs["length"]) == sum(rows["length"])
    found = []
    for pack in packs:
        starts = [place for place, position in enumerate(pack["position_ids"]) if position == 0]
        ends = [*starts[1:], pack["length"]]
        found += [pack["input_ids"][start:end] for start, end in zip(starts, ends, strict=True)]
    assert sorted(found) == sorted(rows["input_ids"][:])


@torch.inference_mode()
def test_packed_rows_have_the_loss_of_rows_one_by_one(rows, toy_engine, toy_tokenizer):
    """The sum over all labels, in float32; seen: 1e-6 of it."""
    collate, model = Collator(toy_tokenizer.pad_id), toy_engine.model

    def total(batch):
        return model(**batch, num_items_in_batch=torch.tensor(1), use_cache=False).loss

    alone = sum(total(collate([row])) for row in rows)
    packs = list(packed(rows, 64))
    assert len({pack["length"] for pack in packs}) > 1  # so that one of them is padded
    together = collate(packs)
    assert "attention_mask" not in together
    torch.testing.assert_close(total(together), alone, rtol=1e-5, atol=0)


@torch.inference_mode()
def test_a_row_does_not_see_what_is_packed_in_front_of_it(rows, toy_engine, toy_tokenizer):
    pack = packed(rows, 64)[0]
    second = pack["position_ids"].index(0, 1)
    batch = Collator(toy_tokenizer.pad_id)([pack])
    changed = batch["input_ids"].clone()
    changed[0, :second] = 1000
    logits = [
        toy_engine.model(input_ids=ids, position_ids=batch["position_ids"], use_cache=False).logits[0, second:]
        for ids in (batch["input_ids"], changed)
    ]
    torch.testing.assert_close(*logits)


def test_a_run_with_packing_learns_every_row_in_fewer_steps(tune, tmp_path, logged):
    """24 rows of about 46 tokens; two packs at a time."""
    fields = {"max_steps": None, "num_train_epochs": 1, "max_source_length": 64, "max_target_length": 127}
    plain = logged(tune(tmp_path / "plain", method="lora", **fields))
    dense = logged(tune(tmp_path / "dense", method="lora", packing=True, **fields))
    assert len(dense) <= len(plain) / 3
    assert dense[1] == pytest.approx(plain[1], rel=0.05)


def test_a_prefix_stands_in_front_of_whole_rows_alone(toy_native, tmp_path):
    with pytest.raises(UserError, match="--packing"):
        TrainArguments(toy_native, tmp_path / "rows", tmp_path / "out", method="ptuning", packing=True)
