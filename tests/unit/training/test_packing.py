"""Packed rows: the same loss, with attention isolated between rows."""

import datasets
import pytest
import torch

from entrypoints.chat_format.prompt import IGNORE_INDEX
from entrypoints.errors import UserError
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.rows.collation import Collator
from entrypoints.training.rows.packing import pack_rows


@pytest.fixture(scope="module")
def rows():
    """12 rows of 5 to 38 ids; the first third of each is prompt."""
    made = []
    for number in range(12):
        length = 5 + 3 * number
        ids = [300 + (7 * number + place) % 900 for place in range(length)]
        labels = [IGNORE_INDEX] * (length // 3) + ids[length // 3 :]
        made.append({"input_ids": ids, "labels": labels, "length": length})
    return datasets.Dataset.from_list(made)


def test_packs_contain_every_row_once_and_complete(rows):
    packs = pack_rows(rows, 64)
    assert max(packs.lengths) <= 64
    assert len(packs) == 5  # the minimum for 258 tokens in packs of 64
    assert sum(packs.lengths) == sum(rows["length"])
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
    together = collate(list(pack_rows(rows, 64)))
    assert together["input_ids"].shape == (1, sum(rows["length"]))  # no padding
    assert "attention_mask" not in together
    torch.testing.assert_close(total(together), alone, rtol=1e-5, atol=0)


@torch.inference_mode()
def test_a_row_does_not_attend_to_rows_packed_before_it(rows, toy_engine, toy_tokenizer):
    pack = pack_rows(rows, 64)[0]
    second = pack["position_ids"].index(0, 1)
    batch = Collator(toy_tokenizer.pad_id)([pack])
    changed = batch["input_ids"].clone()
    changed[0, :second] = 1000
    logits = [
        toy_engine.model(input_ids=ids, position_ids=batch["position_ids"], use_cache=False).logits[0, second:]
        for ids in (batch["input_ids"], changed)
    ]
    torch.testing.assert_close(*logits)


@pytest.mark.slow
def test_a_run_with_packing_trains_on_every_row_in_fewer_steps(tune, tmp_path, logged):
    """24 rows of about 46 tokens; two packs at a time."""
    fields = {"max_steps": None, "num_train_epochs": 1, "max_source_length": 64, "max_target_length": 127}
    plain = logged(tune(tmp_path / "plain", method="lora", **fields))
    dense = logged(tune(tmp_path / "dense", method="lora", packing=True, **fields))
    assert len(dense) <= len(plain) / 3
    assert dense[1] == pytest.approx(plain[1], rel=0.05)


def test_packing_with_a_prefix_is_rejected(toy_native, tmp_path):
    with pytest.raises(UserError, match="--packing"):
        TrainArguments(toy_native, tmp_path / "rows", tmp_path / "out", method="ptuning", packing=True)
