"""Prepare a model in a model store: download or find it, convert it, and optionally quantize it.

MODEL is `demo` (a tiny model, trained here), a hub's ORG/NAME, a folder in either layout, or the name of a folder below
--look-in. A LoRA is merged into its base model, which is searched in STORE and --look-in. The converted checkpoint is
STORE/MODEL (for a folder: STORE and its name), the GGUF file STORE/MODEL-q4_0.gguf. An existing model is only verified.
Safe to run again and in two processes at once; an interrupted download resumes. Prints the paths of folder and file.
"""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

from entrypoints.checkpoint.gguf_reader import GGUF_TYPES
from entrypoints.engines.packages import (
    CONVERSION_PACKAGES,
    QUANTIZATION_PACKAGES,
    TRAINING_PACKAGES,
    require_packages,
)
from entrypoints.families import DEFAULT_FAMILY, family_named
from entrypoints.flags import add_family_flag
from entrypoints.hub.download import SOURCES
from entrypoints.settings import Settings
from entrypoints.sizes import format_size

logger = logging.getLogger(__name__)
DEMO = "demo"  # as in hub/model_store.py, whose import needs torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm prepare`."""
    parser.add_argument("model", metavar="MODEL", help="demo, ORG/NAME, or a folder")
    parser.add_argument("store", type=Path, metavar="STORE", help="folder of the model store")
    parser.add_argument(
        "--quantize", choices=GGUF_TYPES, metavar="TYPE", help=f"also create a GGUF file: {', '.join(GGUF_TYPES)}"
    )
    parser.add_argument(
        "--source", choices=("auto", *SOURCES), default="auto", help=f"auto tries {', then '.join(SOURCES)}"
    )
    parser.add_argument(
        "--look-in",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder that may contain MODEL by name, such as a mirror or the folder of training runs; may be repeated",
    )
    add_family_flag(parser)


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Prepare the model, and print the paths of its folder and file."""
    trains_demo = args.model == DEMO and not (args.store / DEMO).is_dir()
    require_packages(
        *CONVERSION_PACKAGES,
        *(QUANTIZATION_PACKAGES if args.quantize else ()),
        *(TRAINING_PACKAGES if trains_demo else ()),
    )
    from entrypoints.hub.model_store import PrepareOptions, prepare_gguf, prepare_model

    options = PrepareOptions(
        settings, lambda folder: _create_demo(folder, args.family), _merge, args.source, args.look_in, args.family
    )
    folder = prepare_model(args.store, args.model, options)
    file = prepare_gguf(folder, args.quantize, _quantize) if args.quantize else None
    print(*filter(None, (folder, file)), sep="\n")


def _quantize(folder: Path, target: Path, type_: str, on_validated: Callable[[Path], object]) -> None:
    from entrypoints.quantization.to_gguf import QuantizeOptions, quantize

    size, divergence = quantize(QuantizeOptions(folder, target, type_), on_validated)
    logger.info("%s: %s, %s", target, format_size(size), divergence)


def _merge(adapter: Path, base: Path, target: Path) -> None:
    from entrypoints.training.result.export import ExportOptions, export

    require_packages(*TRAINING_PACKAGES)
    export(adapter, target, ExportOptions(base, overwrite=True))


def _create_demo(folder: Path, family: str | None) -> Path:
    from entrypoints.demo.recipe import train_demo_model

    return train_demo_model(folder, family_named(family or DEFAULT_FAMILY))
