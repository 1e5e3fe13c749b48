"""How many replicas for how many users: a model of one page, not a measurement.

A step writes one token of every answer that runs. It reads all weights and the cache of each answer, so its time is
bytes / (bandwidth x EFFICIENCY). Prompts are read at 2 floating-point operations a weight, and take that share of the
time from the steps. Users ask, read for a while, and ask again; answers that run follow from Little's law.

    python3 k8s/capacity.py            # the table of k8s/README.md
    python3 k8s/capacity.py --users 300 --answer 500 --speed 30
"""

import argparse
import math
from dataclasses import dataclass

WEIGHTS = 6.24e9  # numbers of ChatGLM3-6B
WEIGHT_BYTES = 2 * WEIGHTS  # float16
CACHE_BYTES = 2 * 28 * 2 * 128 * 2  # a token: keys and values, layers, groups, numbers of a head, bytes: 28 KiB
MEMORY_SHARE, WORKSPACE = 0.9, 2e9  # of a card's memory; bytes for activations
EFFICIENCY = 0.5  # of the data sheet's bandwidth and arithmetic: an assumption; two cores reached 0.39 of theirs
SLOTS = 64  # --slots of components/vllm
BUSY = 0.7  # of slots and time: room for peaks, and for one replica that restarts


@dataclass(frozen=True)
class Card:
    """Data sheet: bytes, bytes a second, float16 operations a second."""

    name: str
    memory: float
    bandwidth: float
    operations: float


CARDS = (
    Card("T4", 16e9, 320e9, 65e12),
    Card("RTX 4090", 24e9, 1008e9, 165e12),
    Card("L20", 48e9, 864e9, 119e12),
    Card("A100 80G", 80e9, 2039e9, 312e12),
    Card("H100", 80e9, 3350e9, 989e12),
)


@dataclass(frozen=True)
class Load:
    """What users do: tokens of a prompt and of an answer, seconds between an answer and the next question."""

    prompt: float = 800
    answer: float = 250
    pause: float = 60
    speed: float = 20  # tokens a second that each must see


def most_at_once(card: Card, load: Load) -> int:
    """Answers whose cache fits beside the weights, no more than there are slots."""
    room = MEMORY_SHARE * card.memory - WEIGHT_BYTES - WORKSPACE
    return max(0, min(SLOTS, int(room / (CACHE_BYTES * (load.prompt + load.answer)))))


def step_seconds(card: Card, load: Load, running: float, weight_bytes: float = WEIGHT_BYTES) -> float:
    """Time to write one token of every running answer."""
    cache = running * CACHE_BYTES * (load.prompt + load.answer / 2)
    return (weight_bytes + cache) / (card.bandwidth * EFFICIENCY)


def running(card: Card, load: Load, users: float) -> float:
    """Answers that run on one replica with so many users; infinity when it cannot keep up."""
    count = 1.0
    for _ in range(200):
        seconds = load.answer * step_seconds(card, load, count)
        asked = users / (load.pause + seconds)  # a second
        reading = asked * load.prompt * 2 * WEIGHTS / (card.operations * EFFICIENCY)
        if reading >= BUSY:
            return math.inf
        count = asked * seconds / (1 - reading)
    return count


def users_of_one(card: Card, load: Load) -> int:
    """Most users of a replica that see `speed` and leave it no busier than BUSY."""
    most = BUSY * most_at_once(card, load)

    def bears(users: int) -> bool:
        count = running(card, load, users)
        return count <= most and 1 / step_seconds(card, load, count) >= load.speed

    low, high = 0, 1 << 20
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bears(middle) else (low, middle)
    return low


def replicas(card: Card, load: Load, users: int) -> int | None:
    """Cards for so many users, one more than needed from the second on; None when one user is too many."""
    each = users_of_one(card, load)
    needed = math.ceil(users / each) if each else None
    return needed + 1 if needed and needed > 1 else needed


def table(load: Load, counts: list[int]) -> str:
    """In Markdown."""
    lines = ["| card | answers at once | users of one | " + " | ".join(f"{count:,} users" for count in counts) + " |"]
    lines.append("|---" * (3 + len(counts)) + "|")
    for card in CARDS:
        found = [replicas(card, load, count) for count in counts]
        fits = most_at_once(card, load)
        none = "too slow" if fits else "no room"
        cells = [card.name, fits, users_of_one(card, load), *(each or none for each in found)]
        lines.append("| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else cell for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table for a load."""
    usual = Load()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, nargs="+", default=[10, 100, 1000, 10000], help="who use it at one time")
    parser.add_argument("--prompt", type=float, default=usual.prompt, help="tokens, history included")
    parser.add_argument("--answer", type=float, default=usual.answer, help="tokens")
    parser.add_argument("--pause", type=float, default=usual.pause, help="seconds from an answer to the next question")
    parser.add_argument("--speed", type=float, default=usual.speed, help="tokens a second that each must see")
    given = parser.parse_args()
    print(table(Load(given.prompt, given.answer, given.pause, given.speed), given.users))


if __name__ == "__main__":
    main()
