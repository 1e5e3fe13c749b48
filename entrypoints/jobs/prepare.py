"""Fill a model store once: download or find a model, convert it, and quantise it if asked; what is there is checked.

MODEL is `demo` (a toy, made here), a hub's ORG/NAME, a folder in either layout, or the name of one below --look-in.
STORE/MODEL becomes the converted checkpoint (of a folder: STORE/ITS-NAME), STORE/MODEL-q4_0.gguf the GGUF file.
Safe to run again and twice at once; an interrupted download goes on. Prints what is ready.
"""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

from entrypoints.checkpoint.gguf import TYPES
from entrypoints.checkpoint.hub import SOURCES
from entrypoints.engines.packages import CONVERTING, QUANTISING, TRAINING, require_packages
from entrypoints.settings import Settings

logger = logging.getLogger(__name__)
DEMO = "demo"  # as in checkpoint/store.py, which needs torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm prepare`."""
    parser.add_argument("model", metavar="MODEL", help="demo, ORG/NAME, or a folder")
    parser.add_argument("store", type=Path, metavar="STORE", help="folder to fill")
    parser.add_argument("--quantize", choices=TYPES, metavar="TYPE", help=f"also make a GGUF file: {', '.join(TYPES)}")
    parser.add_argument(
        "--source", choices=("auto", *SOURCES), default="auto", help=f"auto asks {', then '.join(SOURCES)}"
    )
    parser.add_argument(
        "--look-in",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="where a MODEL without a slash may lie, as a mirror or the folder of training runs; may be repeated",
    )


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Fill the store, and print the folder and the file."""
    taught_here = args.model == DEMO and not (args.store / DEMO).is_dir()
    require_packages(*CONVERTING, *(QUANTISING if args.quantize else ()), *(TRAINING if taught_here else ()))
    from entrypoints.checkpoint import store

    folder = store.fill(args.store, args.model, args.look_in, args.source, settings, _make_demo)
    file = store.quantized(folder, args.quantize, _quantise) if args.quantize else None
    print(*filter(None, (folder, file)), sep="\n")


def _quantise(folder: Path, target: Path, type_: str, finished: Callable[[Path], object]) -> None:
    from entrypoints.engines.quantising import Order, quantise

    size, found = quantise(Order(folder, target, type_), finished)
    logger.info("%s: %.0f MB, %s", target, size / 1e6, found)


def _make_demo(folder: Path) -> Path:
    from entrypoints.demo.recipe import make_quickly

    return make_quickly(folder)
