"""Rows to batches: encoded once, before any process waits, and padded only to the longest row of a batch."""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import datasets
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from entrypoints.checkpoint.tokenizer import Tokenizer
from entrypoints.dataset.reading import Example
from entrypoints.prompt import IGNORED, Message, PromptFormat
from entrypoints.training import packing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowEncoder:
    """Turns examples into ids and labels; can be sent to a worker process."""

    tokenizer: Tokenizer
    prompt_format: PromptFormat
    max_source_length: int
    max_target_length: int

    def __call__(self, row: dict) -> dict:
        """`input_ids`, `labels` and `length` of one row, and what was cut."""
        turns = (
            json.loads(row["turns"])
            if row.get("turns")
            else [*row["history"], Message("user", row["prompt"]), Message("assistant", row["response"])]
        )
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


def encode_rows(examples: Sequence[Example], encoder: RowEncoder, workers: int = 1) -> datasets.Dataset:
    """Encode all rows, in order, and log how many were cut.

    Raises UserError when the limits do not hold the prompt's frame.
    """
    rows = [
        {
            "prompt": row.prompt,
            "response": row.response,
            "history": [list(pair) for pair in row.history],
            "turns": json.dumps(row.turns) if row.turns else "",  # a text: tools of one row have not another's fields
        }
        for row in examples
    ]
    workers = min(workers, len(rows))
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    encoder(rows[0])  # limits that hold no frame fail here, before worker processes start
    encoded = datasets.Dataset.from_list(rows).map(
        encoder,
        remove_columns=list(rows[0]),
        num_proc=workers if workers > 1 else None,
        desc="rows",
    )
    cut = {name: sum(encoded[name]) for name in ("source_cut", "target_cut")}
    lengths = encoded["length"]
    logger.info(
        "%d rows, %.1f tokens on average, %d at most; %d prompts and %d answers cut to the limits",
        len(rows), sum(lengths) / len(rows), max(lengths), cut["source_cut"], cut["target_cut"],
    )  # fmt: skip
    return encoded.remove_columns(list(cut))


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
