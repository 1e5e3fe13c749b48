"""NVIDIA cards by name, from their data sheets: to plan for a GPU that this machine does not have.

A100, A800, H100, H800 and V100 are the SXM modules. Operations are dense, multiplied in 16 bits and added in float32.
Checked against tables that cite the data sheets: Lightning (fabric/utilities/throughput.py) for T4, V100, A10, A100 and
H100; AReaL and verl (flops_counter.py) for L20, L40S, H20, H200 and H800.
"""

import re
from dataclasses import dataclass

from entrypoints.errors import UserError
from entrypoints.sizes import format_size

GB = 10**9
MAX_GIGABYTES = 1024
GIGABYTES = re.compile(r"(\d+(?:\.\d+)?)\s*(?:gb?)?")
OMITTED_WORDS = re.compile(r"nvidia|geforce|tesla|quadro|rtx|[\s_-]|gb?$")


@dataclass(frozen=True)
class Card:
    """Memory in bytes, bandwidth in bytes/s, dense 16-bit operations/s; 0 where only the memory is known.

    capability: the compute capability of CUDA, at least.
    """

    name: str
    memory: float
    bandwidth: float = 0
    operations: float = 0
    capability: float = 8.0

    def __str__(self) -> str:
        return f"{self.name}, {format_size(self.memory)}" if self.name else format_size(self.memory)

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bfloat16."""
        return self.capability >= 8


CARDS = (
    Card("T4", 16e9, 320e9, 65e12, capability=7.5),
    Card("V100 16G", 16e9, 900e9, 125e12, capability=7.0),
    Card("V100 32G", 32e9, 900e9, 125e12, capability=7.0),
    Card("RTX 3090", 24e9, 936e9, 71e12),
    Card("RTX 4090", 24e9, 1008e9, 165e12),
    Card("A10", 24e9, 600e9, 125e12),
    Card("L4", 24e9, 300e9, 121e12),
    Card("RTX 5090", 32e9, 1792e9, 210e12),
    Card("A100 40G", 40e9, 1555e9, 312e12),
    Card("RTX A6000", 48e9, 768e9, 155e12),
    Card("L20", 48e9, 864e9, 119e12),
    Card("L40S", 48e9, 864e9, 362e12),
    Card("A100 80G", 80e9, 2039e9, 312e12),
    Card("A800 80G", 80e9, 2039e9, 312e12),
    Card("H100", 80e9, 3350e9, 989e12),
    Card("H800", 80e9, 3350e9, 989e12),
    Card("H20", 96e9, 4000e9, 148e12),
    Card("H200", 141e9, 4800e9, 989e12),
)


def parse_card(text: str) -> Card:
    """The card of this name, or one with so many GB (10^9 bytes) of memory.

    Case, spaces and words such as "NVIDIA" and "RTX" do not matter. Raises UserError: neither, or several cards.
    """
    key = _key(text)
    exact = [card for card in CARDS if _key(card.name) == key]
    found = exact or [card for card in CARDS if key and key[0].isalpha() and _key(card.name).startswith(key)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"--gpu-memory {text} names several cards", f"name one of {', '.join(card.name for card in found)}"
        )
    size = GIGABYTES.fullmatch(text.strip().lower())
    gigabytes = float(size[1]) if size else 0
    if not 1 <= gigabytes <= MAX_GIGABYTES:
        names = ", ".join(card.name for card in CARDS)
        raise UserError(
            f"--gpu-memory {text} is neither a known card nor a number of GB from 1 to {MAX_GIGABYTES}",
            f"give the memory of one GPU, such as 24, or one of {names}",
        )
    return Card("", gigabytes * GB)


def _key(name: str) -> str:
    return OMITTED_WORDS.sub("", name.lower().strip())
