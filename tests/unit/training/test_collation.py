"""Rows to batches. How one row is framed, cut and masked is prompt.py's: tests/unit/test_training_rows.py."""

import pickle
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch

from entrypoints.chat_format.answer_parser import decode
from entrypoints.chat_format.prompt import IGNORE_INDEX, Message, PromptFormat
from entrypoints.dataset.reader import Example, SkippedRow
from entrypoints.errors import UserError
from entrypoints.training.rows import collation
from entrypoints.training.rows.collation import Collator, RowEncoder, encode_rows


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


def test_a_row_far_above_the_limits_keeps_its_role_tags_and_its_end_token(encoder, toy_tokenizer):
    encoded = encoder(row("裙" * 5000, "美" * 5000))
    ids, labels = encoded["input_ids"], encoded["labels"]
    first = next(index for index, label in enumerate(labels) if label != IGNORE_INDEX)
    assert ids[:2] == [toy_tokenizer.special_token_id("[gMASK]"), toy_tokenizer.special_token_id("<sop>")]
    assert ids[first - 1] == toy_tokenizer.special_token_id("<|assistant|>")
    assert (ids[-1], labels[-1]) == (toy_tokenizer.eos_id, toy_tokenizer.eos_id)
    assert (first, len(ids)) == (64, 64 + 64 + 1)
    assert (encoded["source_truncated"], encoded["target_truncated"], encoded["length"]) == (True, True, len(ids))


def test_the_labels_of_two_turns_are_both_answers_and_their_end_tokens(encoder, toy_tokenizer):
    """The answer to 甲 is 乙, to 丙 it is 丁. None of them is in the tiny vocabulary: they are encoded as bytes."""
    encoded = encoder(row("丙", "丁", [("甲", "乙")]))
    names = {toy_tokenizer.special_token_id(f"<|{role}|>"): f"<|{role}|>" for role in ("user", "assistant")}
    names[toy_tokenizer.eos_id] = "</s>"
    text, run = "", []
    for label in [*encoded["labels"], IGNORE_INDEX]:
        if label in names or label == IGNORE_INDEX:
            text, run = text + decode(run, toy_tokenizer).strip() + names.get(label, ""), []
        else:
            run.append(label)
    assert text == "乙<|user|>丁</s>"


def test_padding_is_ignored_by_position_and_a_real_zero_keeps_its_label(toy_tokenizer):
    """The ids of pad and unk are both 0."""
    assert toy_tokenizer.pad_id == 0
    batch = Collator(0)([
        {"input_ids": [5, 6, 0, 2], "labels": [IGNORE_INDEX, 6, 0, 2], "length": 4},
        {"input_ids": [5, 2], "labels": [IGNORE_INDEX, 2], "length": 2},
    ])  # fmt: skip
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 6, 0, 2], [IGNORE_INDEX, 2, IGNORE_INDEX, IGNORE_INDEX]]
    assert batch["input_ids"].tolist() == [[5, 6, 0, 2], [5, 2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_an_unknown_token_of_an_answer_is_a_label(toy_tokenizer, monkeypatch):
    """Where the vocabulary gives id 0, the label is 0."""
    known = toy_tokenizer.encode
    monkeypatch.setattr(toy_tokenizer, "encode", lambda text: [0 if id_ == mark else id_ for id_ in known(text)])
    mark = known("裙")[-1]
    encoded = RowEncoder(toy_tokenizer, PromptFormat(), 64, 64)(row("好", "裙"))
    assert [label for label in encoded["labels"] if label != IGNORE_INDEX].count(0) == 1


def test_a_padded_batch_has_the_loss_of_its_rows_one_by_one(encoder, toy_engine, toy_tokenizer):
    """Label by label, in float32."""
    rows = [encoder(row(text, text * 2)) for text in ("裙", "蓝色条纹衬衫清爽干练", "牛仔裤" * 6)]

    def losses(batch):
        logits = toy_engine.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none", ignore_index=IGNORE_INDEX
        ).view(len(batch["labels"]), -1)

    collate = Collator(toy_tokenizer.pad_id)
    with torch.inference_mode():
        together = losses(collate(rows))
        assert together.shape[1] == max(len(each["input_ids"]) for each in rows) - 1
        for number, each in enumerate(rows):
            alone = losses(collate([each]))[0]
            torch.testing.assert_close(together[number, : len(alone)], alone, atol=1e-5, rtol=1e-5)
            assert not together[number, len(alone) :].any()


@pytest.mark.slow
def test_rows_keep_their_order_with_any_number_of_workers(encoder, tmp_path, monkeypatch):
    """In blocks of 16: what does not fit into the memory is encoded a block at a time."""
    monkeypatch.setattr(collation, "BLOCK_ROWS", 16)
    examples = [example("裙" * (1 + index % 7), f"第{index}行", index) for index in range(40)]
    one, two = (written(examples, encoder, tmp_path / f"{count}", workers=count) for count in (1, 2))
    assert one["input_ids"][:] == two["input_ids"][:] == [
        encoder(row(each.prompt, each.response))["input_ids"] for each in examples
    ]  # fmt: skip
    assert set(one.column_names) == {"input_ids", "labels", "length", "source_truncated", "target_truncated"}


def test_an_encoder_can_be_pickled_for_a_worker(encoder):
    """The vocabulary's own pickling forgets that control tokens in a text are letters."""
    text = row("<|assistant|>", "<|user|>")
    assert pickle.loads(pickle.dumps(encoder))(text) == encoder(text)


def test_truncated_prompts_and_answers_are_counted_in_the_log(encoder, caplog, tmp_path):
    caplog.set_level("INFO")
    examples = [example("裙" * 200, "短"), example("短", "美" * 200), example("短", "短")]
    written(examples, encoder, tmp_path / "rows")
    assert "3 rows" in caplog.text
    assert "truncated: 1 prompts, 1 responses" in caplog.text


@pytest.mark.slow
def test_there_may_be_more_workers_than_rows(encoder, tmp_path):
    assert len(written([example("裙", "好")], encoder, tmp_path / "rows", workers=8)) == 1


SYSTEM = [Message("system", "规" * 200), Message("user", "好"), Message("assistant", "好")]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("place", [0, 2])
def test_a_row_that_exceeds_the_limits_is_skipped_with_its_line_and_the_others_are_encoded(
    workers, place, encoder, tmp_path, monkeypatch
):
    """In blocks of two, so that one block may hold the first row alone; the question's end is all that a cut takes."""
    monkeypatch.setattr(collation, "BLOCK_ROWS", 2)
    examples, skipped = [example("裙", f"第{index}行", index) for index in range(5)], []
    examples[place] = replace(examples[place], turns=SYSTEM)
    found = written(examples, encoder, tmp_path / "rows", workers, skipped.append)
    reason = "--max-source-length 64 does not hold the prompt's system text, tools, tool calls and role tags"
    least = len(PromptFormat().encode([SYSTEM[0], Message("user", "")], encoder.tokenizer))
    assert skipped == [SkippedRow(Path("rows.jsonl"), place + 1, reason, ("--max-source-length", least))]
    others = [each for each in examples if not each.turns]
    assert found["input_ids"][:] == [encoder(row(each.prompt, each.response))["input_ids"] for each in others]


@pytest.mark.parametrize(("limits", "named"), [((3, 64), "--max-source-length 3"), ((64, 1), "--max-target-length 1")])
def test_limits_that_hold_no_plain_row_are_refused_before_any_is_read(limits, named, toy_tokenizer, tmp_path):
    with pytest.raises(UserError, match=f"{named} does not hold .* use at least"):
        encode_rows(unread(), RowEncoder(toy_tokenizer, PromptFormat(), *limits), tmp_path / "rows", print)
