"""Check every file of a converted checkpoint or adapter against its manifest: size and SHA-256."""

import argparse
from pathlib import Path

from entrypoints.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm verify`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with a manifest.json")


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Print how many files are as the manifest says."""
    from tqdm import tqdm

    from entrypoints.checkpoint.manifest import check_manifest, read_manifest

    total = sum(entry["size"] for entry in read_manifest(args.folder)["files"].values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=None) as bar:
        count = check_manifest(args.folder, hashes=True, progress=bar.update)
    print(f"{args.folder}: {count} files as the manifest says")
