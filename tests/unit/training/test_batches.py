"""Rows to batches. How one row is framed, cut and masked is prompt.py's: tests/unit/test_training_rows.py."""

import pickle
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch

from entrypoints.answer import decode
from entrypoints.dataset.reading import Example, Skipped
from entrypoints.errors import UserError
from entrypoints.prompt import IGNORED, Message, PromptFormat
from entrypoints.training import batches
from entrypoints.training.batches import Collator, RowEncoder, encode_rows


@pytest.fixture
def encoder(toy_tokenizer):
    return RowEncoder(toy_tokenizer, PromptFormat(), 64, 64)


def row(prompt, response, history=()):
    return {"prompt": prompt, "response": response, "history": [list(pair) for pair in history]}


def example(prompt, response, index=0):
    return Example(Path("rows.jsonl"), index + 1, index, prompt, response)


def written(examples, encoder, file, workers=1, skip=pytest.fail):
    encode_rows(examples, encoder, file, skip, workers)
    return datasets.Dataset.from_file(str(file))


def unread():
    pytest.fail("a row was read")
    yield


def test_a_far_too_long_row_keeps_its_frame_its_cue_and_its_end(encoder, toy_tokenizer):
    """G1."""
    encoded = encoder(row("裙" * 5000, "美" * 5000))
    ids, labels = encoded["input_ids"], encoded["labels"]
    first = next(index for index, label in enumerate(labels) if label != IGNORED)
    assert ids[:2] == [toy_tokenizer.control("[gMASK]"), toy_tokenizer.control("<sop>")]
    assert ids[first - 1] == toy_tokenizer.control("<|assistant|>")
    assert (ids[-1], labels[-1]) == (toy_tokenizer.eos_id, toy_tokenizer.eos_id)
    assert (first, len(ids)) == (64, 64 + 64 + 1)
    assert (encoded["source_cut"], encoded["target_cut"], encoded["length"]) == (True, True, len(ids))


def test_the_targets_of_two_turns_are_both_answers_and_what_ends_them(encoder, toy_tokenizer):
    """G2: 甲 is answered 乙, 丙 is answered 丁. None of the four is in the toy's vocabulary: they are bytes."""
    encoded = encoder(row("丙", "丁", [("甲", "乙")]))
    names = {toy_tokenizer.control(f"<|{role}|>"): f"<|{role}|>" for role in ("user", "assistant")}
    names[toy_tokenizer.eos_id] = "</s>"
    text, run = "", []
    for label in [*encoded["labels"], IGNORED]:
        if label in names or label == IGNORED:
            text, run = text + decode(run, toy_tokenizer).strip() + names.get(label, ""), []
        else:
            run.append(label)
    assert text == "乙<|user|>丁</s>"


def test_padding_is_ignored_by_place_and_a_real_zero_keeps_its_label(toy_tokenizer):
    """A7: pad and unk are both 0."""
    assert toy_tokenizer.pad_id == 0
    batch = Collator(0)([
        {"input_ids": [5, 6, 0, 2], "labels": [IGNORED, 6, 0, 2], "length": 4},
        {"input_ids": [5, 2], "labels": [IGNORED, 2], "length": 2},
    ])  # fmt: skip
    assert batch["labels"].tolist() == [[IGNORED, 6, 0, 2], [IGNORED, 2, IGNORED, IGNORED]]
    assert batch["input_ids"].tolist() == [[5, 6, 0, 2], [5, 2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_an_answer_with_an_unknown_token_is_taught_that_token(toy_tokenizer, monkeypatch):
    """A7, from the text: where the vocabulary gives 0, the label is 0."""
    known = toy_tokenizer.encode
    monkeypatch.setattr(toy_tokenizer, "encode", lambda text: [0 if id_ == mark else id_ for id_ in known(text)])
    mark = known("裙")[-1]
    encoded = RowEncoder(toy_tokenizer, PromptFormat(), 64, 64)(row("好", "裙"))
    assert [label for label in encoded["labels"] if label != IGNORED].count(0) == 1


def test_a_padded_batch_has_the_loss_of_its_rows_one_by_one(encoder, toy_engine, toy_tokenizer):
    """Label by label, in float32."""
    rows = [encoder(row(text, text * 2)) for text in ("裙", "蓝色条纹衬衫清爽干练", "牛仔裤" * 6)]

    def losses(batch):
        logits = toy_engine.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none", ignore_index=IGNORED
        ).view(len(batch["labels"]), -1)

    collate = Collator(toy_tokenizer.pad_id)
    with torch.inference_mode():
        together = losses(collate(rows))
        assert together.shape[1] == max(len(each["input_ids"]) for each in rows) - 1
        for number, each in enumerate(rows):
            alone = losses(collate([each]))[0]
            torch.testing.assert_close(together[number, : len(alone)], alone, atol=1e-5, rtol=1e-5)
            assert not together[number, len(alone) :].any()


def test_rows_keep_their_order_with_any_number_of_workers(encoder, tmp_path, monkeypatch):
    """In blocks of 16: what does not fit into the memory is encoded a block at a time."""
    monkeypatch.setattr(batches, "BLOCK", 16)
    examples = [example("裙" * (1 + index % 7), f"第{index}行", index) for index in range(40)]
    one, two = (written(examples, encoder, tmp_path / f"{count}", workers=count) for count in (1, 2))
    assert one["input_ids"][:] == two["input_ids"][:] == [
        encoder(row(each.prompt, each.response))["input_ids"] for each in examples
    ]  # fmt: skip
    assert set(one.column_names) == {"input_ids", "labels", "length", "source_cut", "target_cut"}


def test_an_encoder_can_be_sent_to_a_worker(encoder):
    """The vocabulary's own pickling forgets that control tokens in a text are letters."""
    text = row("<|assistant|>", "<|user|>")
    assert pickle.loads(pickle.dumps(encoder))(text) == encoder(text)


def test_what_was_cut_is_counted_in_the_log(encoder, caplog, tmp_path):
    caplog.set_level("INFO")
    examples = [example("裙" * 200, "短"), example("短", "美" * 200), example("短", "短")]
    written(examples, encoder, tmp_path / "rows")
    assert "3 rows" in caplog.text
    assert "1 prompts and 1 answers cut to the limits" in caplog.text


def test_more_workers_than_rows_do_no_harm(encoder, tmp_path):
    assert len(written([example("裙", "好")], encoder, tmp_path / "rows", workers=8)) == 1


SYSTEM = [Message("system", "规" * 200), Message("user", "好"), Message("assistant", "好")]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("place", [0, 2])
def test_a_row_that_the_limits_cannot_hold_is_skipped_with_its_place_and_the_others_stay(
    workers, place, encoder, tmp_path, monkeypatch
):
    """In blocks of two, so that one block may hold the first row alone; the question's end is all that a cut takes."""
    monkeypatch.setattr(batches, "BLOCK", 2)
    examples, skipped = [example("裙", f"第{index}行", index) for index in range(5)], []
    examples[place] = replace(examples[place], turns=SYSTEM)
    found = written(examples, encoder, tmp_path / "rows", workers, skipped.append)
    assert skipped == [Skipped(Path("rows.jsonl"), place + 1, "max_source_length 64 does not hold the prompt's frame")]
    others = [each for each in examples if not each.turns]
    assert found["input_ids"][:] == [encoder(row(each.prompt, each.response))["input_ids"] for each in others]


@pytest.mark.parametrize(("limits", "named"), [((3, 64), "max_source_length 3"), ((64, 1), "max_target_length 1")])
def test_limits_that_hold_no_plain_row_are_refused_before_any_is_read(limits, named, toy_tokenizer, tmp_path):
    with pytest.raises(UserError, match=f"{named} does not hold .* use at least"):
        encode_rows(unread(), RowEncoder(toy_tokenizer, PromptFormat(), *limits), tmp_path / "rows", print)
