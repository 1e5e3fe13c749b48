"""Several rows in one: no padding, and no row sees another.

Each row keeps its own positions, from 0, and nothing but the positions tells where one begins: without an attention
mask, transformers lets a token see its own stretch of rising positions alone, in every kind of attention.
"""

from collections.abc import Sequence

import datasets
import torch

from entrypoints.prompt import IGNORED


def packed(rows: datasets.Dataset, room: int) -> datasets.Dataset:
    """Rows of at most `room` tokens, each made of whole rows: the longest first, each where it fits first."""
    lengths = rows["length"][:]
    bins: list[list[int]] = []
    free: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        place = next((index for index, left in enumerate(free) if left >= lengths[number]), None)
        if place is None:
            place = len(bins)
            bins.append([])
            free.append(room)
        bins[place].append(number)
        free[place] -= lengths[number]
    columns = rows.to_dict()
    return datasets.Dataset.from_list([_joined(columns, numbers) for numbers in bins])


def _joined(columns: dict, numbers: Sequence[int]) -> dict:
    ids = [id_ for number in numbers for id_ in columns["input_ids"][number]]
    labels = [label for number in numbers for label in columns["labels"][number]]
    positions = [place for number in numbers for place in range(len(columns["input_ids"][number]))]
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "length": len(ids)}


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
