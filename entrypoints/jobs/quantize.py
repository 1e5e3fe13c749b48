"""Write a converted checkpoint as one GGUF file, whole (f16) or in 8, 5 or 4 bits, which runs without a GPU.

Types int8 and nf4 make a folder in place of a file, for transformers and bitsandbytes, on GPUs above all.
What is made is loaded before it gets its name: its greedy answers and its odds are compared with the source's, and
what is too far from it is not kept. Prints the name; `glm chat --model OUT` talks to it.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from entrypoints.checkpoint.gguf import TYPES, WEIGHED
from entrypoints.checkpoint.layout import FOLDER_TYPES
from entrypoints.dataset.reading import Columns, Example, examples, read_rows
from entrypoints.engines.packages import QUANTISING, SMALL_FOLDERS, require_packages
from entrypoints.errors import UserError
from entrypoints.settings import Settings

if TYPE_CHECKING:
    from entrypoints.engines.gguf_check import Comparison

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm quantize`."""
    columns = Columns()
    parser.add_argument("folder", type=Path, metavar="DIR", help="converted checkpoint, as glm convert writes it")
    parser.add_argument("target", type=Path, metavar="OUT", help="OUT.gguf, or a folder; appears whole or not at all")
    parser.add_argument(
        "--type",
        choices=(*TYPES, *FOLDER_TYPES),
        default="q4_0",
        help=f"4, 5 or 8 bits for most weights, or 16 as it was trained; {', '.join(FOLDER_TYPES)} make a folder",
    )
    parser.add_argument("--adapter", type=Path, help="converted LoRA to merge in")
    parser.add_argument("--imatrix", type=Path, metavar="ROWS", help="rows of yours that say which weights matter most")
    parser.add_argument("--imatrix-rows", type=int, default=64, help="how many of them to use")
    parser.add_argument("--prompt-column", default=columns.prompt, help="field of ROWS with the prompt")
    parser.add_argument("--response-column", default=columns.response, help="field of ROWS with the answer")
    parser.add_argument("--history-column", help="field of ROWS with earlier [question, answer] pairs")
    parser.add_argument(
        "--conversations-column", help="in place of the three: field of messages, with tools, as the API takes them"
    )
    parser.add_argument("--encoding", default="utf-8", help="of ROWS; gb18030 for GBK")


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Write, check, print the name; on stderr the size and how near it is to its source."""
    if args.folder.suffix == ".gguf":
        raise UserError(f"{args.folder} is quantised already", "name the converted checkpoint it was made from")
    size, found = _folder(args) if args.type in FOLDER_TYPES else _file(args)
    print(args.target)
    print(f"{size / 1e6:,.0f} MB, {found}", file=sys.stderr)


def _file(args: argparse.Namespace) -> "tuple[int, Comparison]":
    require_packages(*QUANTISING)
    rows = _rows(args)
    from entrypoints.engines.quantising import Order, quantise

    source = args.imatrix.name if args.imatrix else ""
    return quantise(Order(args.folder, args.target, args.type, args.adapter, rows, source))


def _folder(args: argparse.Namespace) -> "tuple[int, Comparison]":
    if args.imatrix:
        raise UserError(f"--imatrix changes nothing with --type {args.type}", f"it is for {', '.join(WEIGHED)}")
    if args.adapter:
        raise UserError(
            f"--type {args.type} takes no --adapter", "merge a LoRA first: glm export ADAPTER OUT --base DIR"
        )
    if args.target.suffix == ".gguf":
        raise UserError(f"--type {args.type} makes a folder, {args.target} names a file", "leave out .gguf")
    require_packages(*SMALL_FOLDERS)
    from entrypoints.engines.quantised_folder import quantise_folder

    return quantise_folder(args.folder, args.target, args.type)


def _rows(args: argparse.Namespace) -> list[Example]:
    if args.imatrix is None:
        return []
    if args.imatrix_rows < 1:
        raise UserError(f"--imatrix-rows {args.imatrix_rows} is not 1 or more", "64 are enough as a rule")
    columns = Columns(args.prompt_column, args.response_column, args.history_column, args.conversations_column)
    used, skipped = examples(read_rows(args.imatrix, args.encoding), columns)
    if skipped:
        logger.warning("%d rows of %s cannot be used: see glm data check", len(skipped), args.imatrix)
    return used[: args.imatrix_rows]
