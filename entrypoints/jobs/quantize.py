"""Write a converted checkpoint as one GGUF file, whole (f16) or quantised (q8_0, q4_0), which runs without a GPU.

Prints the file; `glm chat --model FILE.gguf` talks to it.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from entrypoints.checkpoint.gguf import TYPES
from entrypoints.errors import UserError
from entrypoints.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm quantize`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="converted checkpoint, as glm convert writes it")
    parser.add_argument("target", type=Path, metavar="OUT.gguf", help="file to write; appears whole or not at all")
    parser.add_argument(
        "--type", choices=TYPES, default="q4_0", help="4 or 8 bits for each weight, or 16 as it was trained"
    )


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Write, print the file, and its size on stderr."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("this needs the package gguf", "pip install 'glm-entrypoints[quantized]'")
    from entrypoints.checkpoint.gguf_writing import write_gguf

    size = write_gguf(args.folder, args.target, args.type)
    print(args.target)
    print(f"{size / 1e6:,.0f} MB", file=sys.stderr)
