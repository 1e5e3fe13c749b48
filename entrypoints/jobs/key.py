"""Add an API key to the key file of glm serve. The key is printed once; the file contains only its hash."""

import argparse
import sys
from pathlib import Path

from entrypoints.errors import UserError
from entrypoints.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm key`."""
    from entrypoints.api.auth import DEFAULT_MAX_CONCURRENT, DEFAULT_REQUESTS_PER_MINUTE

    parser.add_argument("file", type=Path, metavar="FILE", help="key file; created if it does not exist")
    parser.add_argument("name", metavar="NAME", help="name of the client; appears in logs")
    parser.add_argument(
        "--requests-per-minute", type=int, default=DEFAULT_REQUESTS_PER_MINUTE, help="rate limit of this key"
    )
    parser.add_argument(
        "--concurrent", type=int, default=DEFAULT_MAX_CONCURRENT, help="requests of this key that may run at a time"
    )
    parser.add_argument("--tokens-per-day", type=int, help="quota of this key, prompts and responses together")


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Append the entry and print the key.

    Raises UserError: an invalid or duplicate name, a limit below 1, a file that cannot be written.
    """
    from entrypoints.api.auth import add_key

    quota = [] if args.tokens_per_day is None else [args.tokens_per_day]
    limits = [args.requests_per_minute, args.concurrent, *quota]
    if min(limits) < 1:
        raise UserError(
            "a limit is below 1", "set --requests-per-minute, --concurrent and --tokens-per-day to 1 or more"
        )
    print(add_key(args.file, args.name, limits))
    print(f"key {args.name} added to {args.file}; it is shown only once", file=sys.stderr)
