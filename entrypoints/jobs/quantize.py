"""Convert a checkpoint to one GGUF file for CPUs, in float16 (f16) or quantized to 8, 5 or 4 bits.

The types int8 and nf4 write a folder for transformers and bitsandbytes instead, mainly for GPUs. The output is
validated before it is published: the model answers a few prompts, and its probabilities are compared with those of the
source. Prints the path of the output; `glm chat --model OUT` loads it. OUT.gguf.json
records size and SHA-256 of a GGUF file, for `glm verify`.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from entrypoints.checkpoint.gguf_reader import GGUF_TYPES, IMATRIX_TYPES
from entrypoints.checkpoint.layout import FOLDER_QUANTIZATIONS
from entrypoints.dataset.columns import add_column_flags, add_max_skipped_flag, columns_of_flags
from entrypoints.dataset.reader import Example, examples, read_rows
from entrypoints.engines.packages import BITSANDBYTES_PACKAGES, QUANTIZATION_PACKAGES, require_packages
from entrypoints.errors import UserError
from entrypoints.settings import Settings
from entrypoints.sizes import format_size

if TYPE_CHECKING:
    from entrypoints.quantization.divergence import DivergenceResult

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm quantize`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="converted checkpoint, as glm convert writes it")
    parser.add_argument("target", type=Path, metavar="OUT", help="OUT.gguf, or a folder; written atomically")
    parser.add_argument(
        "--type",
        choices=(*GGUF_TYPES, *FOLDER_QUANTIZATIONS),
        default="q4_0",
        help=f"4, 5, 8 or 16 bits for most weights; {', '.join(FOLDER_QUANTIZATIONS)} write a folder",
    )
    parser.add_argument("--adapter", type=Path, help="converted LoRA to merge")
    parser.add_argument(
        "--imatrix", type=Path, metavar="ROWS", help="file of your rows, to measure the importance matrix on"
    )
    parser.add_argument("--imatrix-rows", type=int, default=64, help="how many of them to use")
    group = parser.add_argument_group("how ROWS are read")
    add_column_flags(group)
    add_max_skipped_flag(group, None)


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Write and validate the output, print its path; on stderr its size and its divergence from the source."""
    if args.folder.suffix == ".gguf":
        raise UserError(f"{args.folder} is already quantized", "pass the converted checkpoint that it was created from")
    quantize = _quantize_to_folder if args.type in FOLDER_QUANTIZATIONS else _quantize_to_file
    size, result = quantize(args)
    print(args.target)
    print(f"{format_size(size)}, {result}", file=sys.stderr)


def _quantize_to_file(args: argparse.Namespace) -> "tuple[int, DivergenceResult]":
    require_packages(*QUANTIZATION_PACKAGES)
    rows = _imatrix_rows(args)
    from entrypoints.checkpoint.manifest import MANIFEST_FILE, sha256, write_file_record
    from entrypoints.quantization.to_gguf import QuantizeOptions, quantize

    manifest = args.folder / MANIFEST_FILE
    made_from = sha256(manifest) if manifest.is_file() and not args.adapter else None
    rows_source = args.imatrix.name if args.imatrix else ""
    return quantize(
        QuantizeOptions(args.folder, args.target, args.type, args.adapter, rows, rows_source),
        lambda finished: write_file_record(args.target, finished, made_from),
    )


def _quantize_to_folder(args: argparse.Namespace) -> "tuple[int, DivergenceResult]":
    if args.imatrix:
        raise UserError(
            f"--imatrix has no effect on --type {args.type}", f"use it with {', '.join(IMATRIX_TYPES)}, or omit it"
        )
    if args.adapter:
        raise UserError(
            f"--type {args.type} does not support --adapter", "merge a LoRA first: glm export ADAPTER OUT --base DIR"
        )
    if args.target.suffix == ".gguf":
        raise UserError(f"--type {args.type} writes a folder, {args.target} names a file", "omit .gguf")
    require_packages(*BITSANDBYTES_PACKAGES)
    from entrypoints.quantization.to_bitsandbytes import quantize_folder

    return quantize_folder(args.folder, args.target, args.type)


def _imatrix_rows(args: argparse.Namespace) -> list[Example]:
    if args.imatrix is None:
        return []
    if args.imatrix_rows < 1:
        raise UserError(f"--imatrix-rows {args.imatrix_rows} is below 1", "64 are usually enough")
    rows = read_rows(args.imatrix, args.encoding)
    used, skipped = examples(rows, columns_of_flags(args), args.max_skipped, args.imatrix)
    if skipped:
        logger.warning("%d rows of %s cannot be used: see glm data check", len(skipped), args.imatrix)
    return used[: args.imatrix_rows]
