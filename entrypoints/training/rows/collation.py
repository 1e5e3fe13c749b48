"""Rows to batches: rows are encoded once, before the processes start, and padded to the longest row of a batch."""

import contextlib
import itertools
import logging
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import pyarrow
import torch
from tqdm import tqdm
from transformers.trainer_pt_utils import get_length_grouped_indices

from entrypoints.chat_format.prompt import IGNORE_INDEX, Message, MessageLike, PromptFormat, split_answer
from entrypoints.checkpoint.tokenizer import Tokenizer
from entrypoints.dataset.reader import Example, SkippedRow
from entrypoints.errors import UserError
from entrypoints.training.rows import packing
from entrypoints.training.rows.position import Position

logger = logging.getLogger(__name__)
BLOCK_ROWS = 4096  # rows encoded and written at once
SCHEMA = pyarrow.schema([
    ("input_ids", pyarrow.list_(pyarrow.int32())),
    ("labels", pyarrow.list_(pyarrow.int32())),
    ("length", pyarrow.int32()),
    ("source_truncated", pyarrow.bool_()),
    ("target_truncated", pyarrow.bool_()),
])  # fmt: skip
PAIR_SCHEMA = pyarrow.schema(
    [*SCHEMA, *(pyarrow.field(name, pyarrow.list_(pyarrow.int32())) for name in ("rejected_ids", "rejected_labels"))]
)


class RowFields(TypedDict):
    """A row as it is sent to a worker process; `turns` replaces the other three where the row is a conversation."""

    prompt: str
    response: str
    history: Sequence[tuple[str, str]]
    turns: NotRequired[list[Message]]
    rejected: NotRequired[list[Message]]  # the other answer of a preference row


class EncodedRow(TypedDict):
    """Token ids and labels of one row, each (T,), and whether the prompt or an answer was truncated.

    Of a preference row both sequences, the chosen answer first; `length` is that of the longer one.
    """

    input_ids: list[int]
    labels: list[int]
    length: int
    source_truncated: bool
    target_truncated: bool
    rejected_ids: NotRequired[list[int]]
    rejected_labels: NotRequired[list[int]]


Outcome = EncodedRow | UserError  # the error says why the row is skipped
RowMapper = Callable[[Callable[[RowFields], Outcome], list[RowFields]], list[Outcome]]


@dataclass(frozen=True)
class RowEncoder:
    """Encodes rows into token ids and labels; can be pickled for a worker process."""

    tokenizer: Tokenizer
    prompt_format: PromptFormat
    max_source_length: int
    max_target_length: int
    pairs: bool = False  # whether the rows are preference rows

    @property
    def schema(self) -> pyarrow.Schema:
        """Columns of the encoded rows."""
        return PAIR_SCHEMA if self.pairs else SCHEMA

    def __call__(self, row: RowFields) -> EncodedRow:
        """Encode one row; raises UserError when the limits are too small for it."""
        if not row.get("rejected"):
            return self._encode(row)
        before, _ = split_answer(row["turns"])
        chosen, rejected = self._encode(row), self._encode({**row, "turns": [*before, *row["rejected"]]})
        return {
            **chosen,
            "length": max(chosen["length"], rejected["length"]),
            "source_truncated": chosen["source_truncated"] or rejected["source_truncated"],
            "target_truncated": chosen["target_truncated"] or rejected["target_truncated"],
            "rejected_ids": rejected["input_ids"],
            "rejected_labels": rejected["labels"],
        }

    def _encode(self, row: RowFields) -> EncodedRow:
        single_turn: list[MessageLike] = [
            *row["history"],
            Message("user", row["prompt"]),
            Message("assistant", row["response"]),
        ]
        turns: list[Message] | list[MessageLike] = row.get("turns") or single_turn
        encoded = self.prompt_format.encode_for_training(
            turns, self.tokenizer, self.max_source_length, self.max_target_length
        )
        return {
            "input_ids": encoded.ids,
            "labels": encoded.labels,
            "length": len(encoded.ids),
            "source_truncated": encoded.source_truncated,
            "target_truncated": encoded.target_truncated,
        }

    def encode_example(self, row: Example) -> EncodedRow:
        """Encode a row of a file; raises UserError as a call does."""
        return self(_fields(row))

    def encode_or_error(self, row: RowFields) -> Outcome:
        """The encoded row, or why it is skipped; an exception would lose the other rows of a worker's block."""
        try:
            return self(row)
        except UserError as error:
            return error

    def check_limits(self) -> None:
        """Raise UserError when the limits are too small for the special tokens of an empty question and answer."""
        self({"history": [], "prompt": "", "response": ""})


def encode_rows(
    examples: Iterable[Example],
    encoder: RowEncoder,
    file: Path,
    skip: Callable[[SkippedRow], None],
    workers: int = 1,
) -> None:
    """Encode all rows into an Arrow file, in order, and log how many were truncated; memory holds one block of rows.

    skip: called for each row that does not fit the limits. Raises UserError when no row could fit them.
    """
    encoder.check_limits()  # before worker processes start
    counts: Counter[str] = Counter()
    bar = tqdm(desc="rows", unit="row", disable=None)
    with _row_mapper(workers) as map_rows, pyarrow.OSFile(str(file), "wb") as sink, bar:
        writer = pyarrow.ipc.new_stream(sink, encoder.schema)
        for block in _blocks(iter(examples)):
            bar.update(len(block))
            rows = _usable_rows(block, map_rows(encoder.encode_or_error, [_fields(row) for row in block]), skip)
            if not rows:
                continue
            writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, encoder.schema))
            counts["rows"] += len(rows)
            counts["tokens"] += sum(row["length"] for row in rows)
            counts["longest"] = max(counts["longest"], *(row["length"] for row in rows))
            counts["sources"] += sum(row["source_truncated"] for row in rows)
            counts["targets"] += sum(row["target_truncated"] for row in rows)
        writer.close()
    logger.info(
        "%d rows, %.1f tokens on average, %d at most; truncated: %d prompts, %d responses",
        counts["rows"], counts["tokens"] / max(counts["rows"], 1), counts["longest"],
        counts["sources"], counts["targets"],
    )  # fmt: skip


def _usable_rows(block: list[Example], encoded: list[Outcome], skip: Callable[[SkippedRow], None]) -> list[EncodedRow]:
    usable = []
    for example, row in zip(block, encoded, strict=True):
        if isinstance(row, UserError):
            skip(SkippedRow.of_error(example, row))
        else:
            usable.append(row)
    return usable


@contextlib.contextmanager
def _row_mapper(workers: int) -> Iterator[RowMapper]:
    """`map` over a block, in this process or in several."""
    if workers == 1:
        yield lambda function, block: [function(row) for row in block]
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield lambda function, block: pool.map(function, block, chunksize=-(-len(block) // workers))


def _blocks(examples: Iterator[Example]) -> Iterator[list[Example]]:
    while block := list(itertools.islice(examples, BLOCK_ROWS)):
        yield block


def _fields(row: Example) -> RowFields:
    fields: RowFields = {"prompt": row.prompt, "response": row.response, "history": row.history, "turns": row.turns}
    return {**fields, "rejected": row.rejected} if row.rejected else fields


@dataclass(frozen=True)
class Collator:
    """Pads a batch on the right to its longest row; labels of padding are IGNORE_INDEX, by position."""

    pad_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `attention_mask` and `labels`, each (B, T); of packed rows those of `packing.collate_packed`."""
        if "position_ids" in rows[0]:
            return packing.collate_packed(rows)
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, filler: int) -> torch.Tensor:
            return torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])

        mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
        return {
            "input_ids": padded("input_ids", self.pad_id),
            "attention_mask": torch.tensor(mask),
            "labels": padded("labels", IGNORE_INDEX),
        }


@dataclass(frozen=True)
class PairCollator:
    """Pads both sequences of each pair on the right to the longest of the batch."""

    pad_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels`, (2B, T) each; with known values also `reference`, (2B,)."""
        sequences = [(row["input_ids"], row["labels"]) for row in rows]
        sequences += [(row["rejected_ids"], row["rejected_labels"]) for row in rows]
        longest = max(len(ids) for ids, _ in sequences)

        def padded(lists: list[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([one + [filler] * (longest - len(one)) for one in lists])

        batch = {
            "input_ids": padded([ids for ids, _ in sequences], self.pad_id),
            "attention_mask": padded([[1] * len(ids) for ids, _ in sequences], 0),
            "labels": padded([labels for _, labels in sequences], IGNORE_INDEX),
        }
        if "reference_chosen" in rows[0]:
            values = [row[f"reference_{name}"] for name in ("chosen", "rejected") for row in rows]
            batch["reference"] = torch.tensor(values)
        return batch


class LengthGroupedSampler(torch.utils.data.Sampler[int]):
    """A random order that groups rows of similar length; only seed, epoch and rows per step determine it.

    So a resumed run continues where it was, and two processes with half a batch each see what one process sees.
    """

    def __init__(self, lengths: Sequence[int], rows_per_step: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.rows_per_step = rows_per_step
        self.seed = seed
        self.epoch = 0
        self.start: Position | None = None  # of the epoch that a resumed run continues
        self.skipped = 0

    def __len__(self) -> int:
        return len(self.lengths) + self.skipped - (self.start.rows if self.start else 0)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        rows_per_step = self.start.ordered_by if self.start else self.rows_per_step
        order: list[int] = get_length_grouped_indices(  # type: ignore[no-untyped-call]  # transformers: untyped
            self.lengths, rows_per_step, generator=generator
        )
        if self.start:
            order = order[:1] * self.skipped + order[self.start.rows :]
        return iter(order)

    def continue_from(self, start: Position | None, skipped: int = 0) -> None:
        """Continue an epoch in the order in which it was begun; None: the next epoch is a whole one.

        skipped: indices to return first, for whole batches that the Trainer skips in place of the rows before `start`.
        """
        self.start, self.skipped = start, skipped

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each pass over the rows."""
        self.epoch = epoch
