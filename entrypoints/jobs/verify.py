"""Check every file of a converted checkpoint or adapter against its manifest: size and SHA-256.

A GGUF file of a model store is checked against the record that `glm prepare` has left beside it.
"""

import argparse
import logging
import time
from pathlib import Path

from entrypoints.errors import UserError
from entrypoints.settings import Settings

logger = logging.getLogger(__name__)
LOOK_SECONDS = 1.0  # between two looks at a folder that is not there yet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm verify`."""
    parser.add_argument("model", type=Path, metavar="DIR|FILE", help="folder with a manifest.json, or GGUF file")
    parser.add_argument(
        "--wait-seconds", type=int, default=0, help="how long to wait for it, while another process prepares it"
    )


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Print how many files are as the manifest says."""
    if args.wait_seconds:
        _wait_for(args.model, args.wait_seconds)
    if args.model.is_file():
        from entrypoints.checkpoint.manifest import check_record

        check_record(args.model)
        print(f"{args.model}: as it was made")
        return
    print(f"{args.model}: {_check_folder(args.model)} files as the manifest says")


def _check_folder(folder: Path) -> int:
    from tqdm import tqdm

    from entrypoints.checkpoint.manifest import check_manifest, read_manifest

    total = sum(entry["size"] for entry in read_manifest(folder)["files"].values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=None) as bar:
        return check_manifest(folder, hashes=True, progress=bar.update)


def _wait_for(model: Path, seconds: int) -> None:
    """Return when it is there: a checkpoint appears whole or not at all. Raises UserError when the time is over."""
    end = time.monotonic() + seconds
    if not model.exists():
        logger.info("waiting for %s", model)
    while not model.exists():
        if time.monotonic() > end:
            raise UserError(f"{model} did not appear within {seconds} seconds", "see what glm prepare says")
        time.sleep(LOOK_SECONDS)
