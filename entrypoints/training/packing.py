"""Several rows in one: no padding, and no row sees another.

Each row keeps its own positions, from 0, and nothing but the positions tells where one begins: without an attention
mask, transformers lets a token see its own stretch of rising positions alone, in every kind of attention.
"""

from collections.abc import Sequence

import datasets
import torch

from entrypoints.prompt import IGNORED


class Packs(torch.utils.data.Dataset):
    """Rows of whole rows, put together when they are asked for; `bins` are the numbers of the rows in each."""

    def __init__(self, rows: datasets.Dataset, bins: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        self.rows = rows
        self.bins = bins
        self.lengths = [sum(lengths[number] for number in numbers) for numbers in bins]

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, place: int | str) -> dict | list[int]:
        """One pack; `length` is the column of their lengths, as a Dataset has it."""
        if place == "length":
            return self.lengths
        rows = [self.rows[number] for number in self.bins[place]]
        joined = {name: [id_ for row in rows for id_ in row[name]] for name in ("input_ids", "labels")}
        positions = [position for row in rows for position in range(row["length"])]
        return {**joined, "position_ids": positions, "length": self.lengths[place]}


def packed(rows: datasets.Dataset, room: int) -> Packs:
    """Packs of at most `room` tokens: the longest rows first, each into the pack that it fills up most."""
    lengths = rows["length"][:]
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(room + 1)]  # packs, by the tokens that still fit
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        left = next((left for left in range(length, room + 1) if with_room[left]), None)
        if left is None:
            left = room
            with_room[room].append(len(bins))
            bins.append([])
        place = with_room[left].pop()
        bins[place].append(number)
        with_room[left - length].append(place)
    return Packs(rows, bins, lengths)


def collate(rows: Sequence[dict], pad_id: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `position_ids` and `labels`, each (rows, longest); padding is a stretch of positions of its own."""
    longest = max(row["length"] for row in rows)
    missing = [longest - row["length"] for row in rows]

    def padded(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[name] + [filler] * count for row, count in zip(rows, missing, strict=True)])

    positions = [row["position_ids"] + list(range(count)) for row, count in zip(rows, missing, strict=True)]
    return {
        "input_ids": padded("input_ids", pad_id),
        "position_ids": torch.tensor(positions),
        "labels": padded("labels", IGNORED),
    }
