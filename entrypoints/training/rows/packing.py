"""Packing: several rows in one sequence without padding, with attention isolated between the rows.

Each row keeps its own position ids, which start at 0, and `methods.attention` computes each row by itself.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import datasets
import torch


class PackedDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Packs of complete rows, joined when they are read; `packs` holds the row indices of each pack."""

    def __init__(self, rows: datasets.Dataset, packs: Sequence[Sequence[int]], row_lengths: Sequence[int]) -> None:
        self.rows = rows
        self.packs = packs
        self.lengths = [sum(row_lengths[index] for index in pack) for pack in packs]  # tokens of each pack

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`input_ids`, `labels`, `position_ids`, `row_lengths` and `length` of one pack."""
        rows = [self.rows[number] for number in self.packs[index]]
        joined = {name: [id_ for row in rows for id_ in row[name]] for name in ("input_ids", "labels")}
        positions = [position for row in rows for position in range(row["length"])]
        lengths = [row["length"] for row in rows]
        return {**joined, "position_ids": positions, "row_lengths": lengths, "length": self.lengths[index]}


def pack_rows(rows: datasets.Dataset, max_tokens: int) -> PackedDataset:
    """Packs of at most `max_tokens` tokens: longest rows first, each into the fullest pack that can take it."""
    lengths = rows["length"][:]
    packs: list[list[int]] = []
    packs_by_space: list[list[int]] = [[] for _ in range(max_tokens + 1)]  # pack numbers by tokens that still fit
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        space = next((space for space in range(length, max_tokens + 1) if packs_by_space[space]), None)
        if space is None:
            space = max_tokens
            packs_by_space[max_tokens].append(len(packs))
            packs.append([])
        pack = packs_by_space[space].pop()
        packs[pack].append(index)
        packs_by_space[space - length].append(pack)
    return PackedDataset(rows, packs, lengths)


def collate_packed(packs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One sequence of all packs, without padding: `input_ids`, `position_ids` and `labels`, each (1, T).

    `row_lengths` and `row_starts` (R + 1,) say where each row is, for the attention.
    """
    joined = {
        name: torch.tensor([[value for pack in packs for value in pack[name]]])
        for name in ("input_ids", "position_ids", "labels")
    }
    lengths = [length for pack in packs for length in pack["row_lengths"]]
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return {**joined, "row_lengths": lengths, "row_starts": starts}
