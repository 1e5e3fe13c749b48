"""Convert an original folder, or its LoRA or P-Tuning v2 adapter, to the native layout, or a native folder back.

The files of the folder, or --family, tell the model family. Plain transformers loads the native layout, without remote
code. Prints the new folder.
"""

import argparse
import logging
from pathlib import Path

from entrypoints.chat_format.prompt import TEMPLATES
from entrypoints.errors import UserError
from entrypoints.flags import add_family_flag
from entrypoints.settings import Settings

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm convert`."""
    parser.add_argument("source", type=Path, metavar="SRC", help="folder to read")
    parser.add_argument("target", type=Path, metavar="DST", help="folder to write; appears atomically")
    parser.add_argument("--to", choices=("native", "original"), default="native", help="layout to write")
    parser.add_argument("--base", type=Path, help="for a LoRA adapter: the converted checkpoint it was tuned on")
    parser.add_argument(
        "--dtype", choices=("keep", "float16", "bfloat16", "float32"), default="keep", help="precision to write"
    )
    add_family_flag(parser)
    parser.add_argument(
        "--template", choices=TEMPLATES, help="prompt format SRC was tuned with; if not given, that of its family"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Convert, and print the new folder."""
    from entrypoints.checkpoint import adapters, adoption, conversion

    if args.source.resolve() == args.target.resolve():
        raise UserError(f"{args.source} is both SRC and DST", "write to another folder")
    if args.to == "original":
        conversion.convert_to_original(args.source, args.target, args.dtype, args.overwrite)
    elif adapters.is_adapter(args.source) or adapters.holds_only_adapters(args.source):
        prompt_format = adapters.adapter_format(args.source, args.base, args.family, args.template)
        logger.info("converting an adapter for %s", prompt_format)
        adapters.convert_adapter(args.source, args.target, args.base, prompt_format, args.overwrite)
    elif adoption.is_foreign_native(args.source):
        adoption.adopt_native(args.source, args.target, args.dtype, args.overwrite, args.family)
    else:
        prompt_format = conversion.original_format(args.source, args.family, args.template)
        conversion.convert_to_native(args.source, args.target, prompt_format, args.dtype, args.overwrite)
    print(args.target)
