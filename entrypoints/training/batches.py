"""Rows to batches: encoded once, before any process waits, and padded only to the longest row of a batch."""

import contextlib
import itertools
import logging
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import torch
from tqdm import tqdm
from transformers.trainer_pt_utils import get_length_grouped_indices

from entrypoints.checkpoint.tokenizer import Tokenizer
from entrypoints.dataset.reading import Example, Skipped
from entrypoints.errors import UserError
from entrypoints.prompt import IGNORED, Message, PromptFormat
from entrypoints.training import packing

logger = logging.getLogger(__name__)
BLOCK = 4096  # rows that are encoded and written at once
SCHEMA = pyarrow.schema([
    ("input_ids", pyarrow.list_(pyarrow.int32())),
    ("labels", pyarrow.list_(pyarrow.int32())),
    ("length", pyarrow.int32()),
    ("source_cut", pyarrow.bool_()),
    ("target_cut", pyarrow.bool_()),
])  # fmt: skip


@dataclass(frozen=True)
class RowEncoder:
    """Turns examples into ids and labels; can be sent to a worker process."""

    tokenizer: Tokenizer
    prompt_format: PromptFormat
    max_source_length: int
    max_target_length: int

    def __call__(self, row: dict) -> dict:
        """`input_ids`, `labels` and `length` of one row, and what was cut."""
        asked = [*row["history"], Message("user", row["prompt"]), Message("assistant", row["response"])]
        turns = row.get("turns") or asked
        encoded = self.prompt_format.encode_for_training(
            turns, self.tokenizer, self.max_source_length, self.max_target_length
        )
        return {
            "input_ids": encoded.ids,
            "labels": encoded.labels,
            "length": len(encoded.ids),
            "source_cut": encoded.source_cut,
            "target_cut": encoded.target_cut,
        }

    def row_or_reason(self, row: dict) -> dict | str:
        """The encoded row, or why it cannot be: a reason, unlike an error, leaves the other rows of a worker alone."""
        try:
            return self(row)
        except UserError as error:
            return error.problem

    def check_limits(self) -> None:
        """Raise UserError when the limits do not hold the frame of a plain question and answer."""
        self({"history": [], "prompt": "", "response": ""})


def encode_rows(
    examples: Iterable[Example],
    encoder: RowEncoder,
    file: Path,
    skip: Callable[[Skipped], None],
    workers: int = 1,
) -> None:
    """Encode all rows into a file, in order, and log how many were cut; only a block of them is in memory at a time.

    skip: is told of each row that alone does not fit the limits. Raises UserError when no plain row could.
    """
    encoder.check_limits()  # here, before worker processes start
    counts = Counter()
    bar = tqdm(desc="rows", unit="row", disable=None)
    with _mapper(workers) as mapped, pyarrow.OSFile(str(file), "wb") as sink, bar:
        writer = pyarrow.ipc.new_stream(sink, SCHEMA)
        for block in _blocks(iter(examples)):
            bar.update(len(block))
            rows = _usable(block, mapped(encoder.row_or_reason, [_fields(row) for row in block]), skip)
            if not rows:
                continue
            writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, SCHEMA))
            counts.update({name: sum(row[name] for row in rows) for name in ("length", "source_cut", "target_cut")})
            counts["rows"] += len(rows)
            counts["longest"] = max(counts["longest"], *(row["length"] for row in rows))
        writer.close()
    _log(counts)


def _usable(block: list[Example], encoded: list[dict | str], skip: Callable[[Skipped], None]) -> list[dict]:
    for example, found in zip(block, encoded, strict=True):
        if isinstance(found, str):
            skip(Skipped(example.file, example.line, found))
    return [found for found in encoded if not isinstance(found, str)]


def _log(counts: Counter) -> None:
    average = counts["length"] / max(counts["rows"], 1)
    logger.info(
        "%d rows, %.1f tokens on average, %d at most; %d prompts and %d answers cut to the limits",
        counts["rows"], average, counts["longest"], counts["source_cut"], counts["target_cut"],
    )  # fmt: skip


@contextlib.contextmanager
def _mapper(workers: int) -> Iterator[Callable]:
    """`map` over a block, in this process or in several."""
    if workers == 1:
        yield lambda function, block: [function(row) for row in block]
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield lambda function, block: pool.map(function, block, chunksize=-(-len(block) // workers))


def _blocks(examples: Iterator[Example]) -> Iterator[list[Example]]:
    while block := list(itertools.islice(examples, BLOCK)):
        yield block


def _fields(row: Example) -> dict:
    return {"prompt": row.prompt, "response": row.response, "history": row.history, "turns": row.turns}


@dataclass(frozen=True)
class Collator:
    """Pads a batch on the right to its longest row; labels of padding are IGNORED, by position and never by id."""

    pad_id: int

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels`, each (rows, longest); of packed rows their positions instead."""
        if "position_ids" in rows[0]:
            return packing.collate(rows, self.pad_id)
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, filler: int) -> torch.Tensor:
            return torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])

        mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
        return {
            "input_ids": padded("input_ids", self.pad_id),
            "attention_mask": torch.tensor(mask),
            "labels": padded("labels", IGNORED),
        }


class GroupedByLength(torch.utils.data.Sampler[int]):
    """A random order that puts rows of like length together; seed, epoch and `rows` of a step alone decide it.

    So a resumed run goes on where it was, and two processes with half a batch each see what one sees.
    """

    def __init__(self, lengths: Sequence[int], rows: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.rows = rows
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.rows, generator=order))

    def set_epoch(self, epoch: int) -> None:
        """The Trainer says which pass over the rows comes next."""
        self.epoch = epoch
