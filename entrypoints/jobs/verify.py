"""Check every file of a converted checkpoint or adapter against its manifest: size and SHA-256.

A GGUF file is checked against the record FILE.json that `glm prepare` or `glm quantize` wrote beside it: copy both.
"""

import argparse
import logging
import time
from pathlib import Path

from entrypoints.errors import UserError
from entrypoints.settings import Settings

logger = logging.getLogger(__name__)
POLL_SECONDS = 1.0  # while waiting for a model that does not exist yet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm verify`."""
    parser.add_argument("model", type=Path, metavar="DIR|FILE", help="folder with a manifest.json, or GGUF file")
    parser.add_argument(
        "--wait-seconds", type=int, default=0, help="how long to wait for the model, while another process prepares it"
    )


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Verify, and print how many files match."""
    if args.wait_seconds:
        _wait_for(args.model, args.wait_seconds)
    if args.model.is_file():
        from entrypoints.checkpoint.manifest import check_file_record

        check_file_record(args.model)
        print(f"{args.model}: matches its SHA-256")
        return
    print(f"{args.model}: {_verify_folder(args.model)} files match the manifest")


def _verify_folder(folder: Path) -> int:
    from tqdm import tqdm

    from entrypoints.checkpoint.manifest import check_manifest, read_manifest

    total = sum(entry["size"] for entry in read_manifest(folder)["files"].values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=None) as bar:
        return check_manifest(folder, hashes=True, progress=bar.update)


def _wait_for(model: Path, seconds: int) -> None:
    """Return when the model exists: it appears atomically. Raises UserError: it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    if not model.exists():
        logger.info("waiting for %s", model)
    while not model.exists():
        if time.monotonic() > deadline:
            raise UserError(f"{model} did not appear within {seconds} seconds", "see the output of glm prepare")
        time.sleep(POLL_SECONDS)
