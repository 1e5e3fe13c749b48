"""Turn an original ChatGLM3 folder (or its LoRA or P-Tuning v2 adapter) into a native one, or a native one back."""

import argparse
import logging
from pathlib import Path

from entrypoints.errors import UserError
from entrypoints.prompt import TEMPLATES
from entrypoints.settings import Settings

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm convert`."""
    parser.add_argument("source", type=Path, metavar="SRC", help="folder to read")
    parser.add_argument("target", type=Path, metavar="DST", help="folder to write; appears whole or not at all")
    parser.add_argument("--to", choices=("native", "original"), default="native", help="layout to write")
    parser.add_argument("--base", type=Path, help="for a LoRA adapter: the converted checkpoint it was tuned on")
    parser.add_argument(
        "--dtype", choices=("keep", "float16", "bfloat16", "float32"), default="keep", help="precision to write"
    )
    parser.add_argument("--template", choices=TEMPLATES, default="chatglm3", help="prompt format SRC was tuned with")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Convert, and print the new folder."""
    from entrypoints.checkpoint import adapters, conversion
    from entrypoints.prompt import PromptFormat

    if args.source.resolve() == args.target.resolve():
        raise UserError(f"{args.source} is both SRC and DST", "write into another folder")
    prompt_format = PromptFormat(args.template)
    if args.to == "original":
        conversion.convert_to_original(args.source, args.target, args.dtype, args.overwrite)
    elif adapters.is_adapter(args.source):
        logger.info("an adapter, tuned with the prompt template %r (--template says otherwise)", args.template)
        adapters.convert_adapter(args.source, args.target, args.base, prompt_format, args.overwrite)
    else:
        conversion.convert_to_native(args.source, args.target, prompt_format, args.dtype, args.overwrite)
    print(args.target)
