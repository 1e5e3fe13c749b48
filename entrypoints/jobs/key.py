"""Add an API key to the key file of glm serve; the key is printed once, the file keeps only its hash."""

import argparse
import os
import sys
from pathlib import Path

from entrypoints.errors import UserError
from entrypoints.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm key`."""
    from entrypoints.api.auth import CONCURRENT, REQUESTS_PER_MINUTE

    parser.add_argument("file", type=Path, metavar="FILE", help="key file; made if it does not exist")
    parser.add_argument("name", metavar="NAME", help="who will use it; shown in logs")
    parser.add_argument("--requests-per-minute", type=int, default=REQUESTS_PER_MINUTE, help="its limit")
    parser.add_argument("--concurrent", type=int, default=CONCURRENT, help="requests that may run at a time")


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Append the line, and print the key."""
    from entrypoints.api.auth import digest, new_key, read_keys

    if not args.name.isprintable() or args.name.split() != [args.name] or "#" in args.name:
        raise UserError(f"{args.name!r} cannot be a key's name", "use letters without blanks")
    if min(args.requests_per_minute, args.concurrent) < 1:
        raise UserError("a limit is below 1", "use --requests-per-minute and --concurrent of 1 or more")
    if args.file.is_file() and any(key.name == args.name for key in read_keys(args.file)):
        raise UserError(f"{args.file} has a key named {args.name}", "choose another name, or delete its line first")
    key = new_key()
    try:
        with open(args.file, "a+", encoding="utf-8", opener=_private) as stream:
            stream.seek(0)
            text = stream.read()
            glue = "\n" if text and not text.endswith("\n") else ""
            stream.write(f"{glue}{args.name} {digest(key)} {args.requests_per_minute} {args.concurrent}\n")
    except OSError as error:
        raise UserError(f"cannot write {args.file} ({error.strerror})", "choose another file") from error
    print(key)
    print(f"key {args.name} added to {args.file}; it is shown only now", file=sys.stderr)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
