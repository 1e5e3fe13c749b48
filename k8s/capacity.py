"""GPUs for a number of users of ChatGLM3-6B, as a table in Markdown; the model is entrypoints/doctor/capacity.py.

.venv/bin/python k8s/capacity.py            # the table of k8s/README.md
.venv/bin/python k8s/capacity.py --users 300 --answer 500 --speed 30
"""

import argparse
from collections.abc import Sequence

from entrypoints.doctor.capacity import Load, Served, max_running, replicas, users_per_replica
from entrypoints.hardware.cards import parse_card
from entrypoints.hub.model_dimensions import PUBLISHED

CARDS = tuple(map(parse_card, ("T4", "RTX 4090", "L20", "A100 80G", "H100")))
MODEL = Served.in_16_bits(PUBLISHED["THUDM/chatglm3-6b"])


def table(load: Load, user_counts: Sequence[int]) -> str:
    """The capacity table in Markdown."""
    counts = " | ".join(f"{count:,} users" for count in user_counts)
    lines = [f"| GPU | running requests | users per GPU | {counts} |", "|---" * (3 + len(user_counts)) + "|"]
    for card in CARDS:
        running = max_running(card, MODEL, load)
        impossible = "too slow" if running else "too small"
        needed = [replicas(card, MODEL, load, count) or impossible for count in user_counts]
        cells = [card.name, running, users_per_replica(card, MODEL, load), *needed]
        lines.append("| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else cell for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table for a load."""
    default = Load()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, nargs="+", default=[10, 100, 1000, 10000], help="concurrent users")
    parser.add_argument("--prompt", type=float, default=default.prompt, help="tokens per prompt, history included")
    parser.add_argument("--answer", type=float, default=default.answer, help="tokens per answer")
    parser.add_argument("--pause", type=float, default=default.pause, help="seconds from an answer to the next prompt")
    parser.add_argument("--speed", type=float, default=default.speed, help="minimum tokens/s for each user")
    args = parser.parse_args()
    print(table(Load(args.prompt, args.answer, args.pause, args.speed), args.users))


if __name__ == "__main__":
    main()
