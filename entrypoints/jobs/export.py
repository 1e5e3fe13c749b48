"""Write a checkpoint of glm train, its ZeRO shards or its LoRA as a plain model folder."""

import argparse
import shutil
from pathlib import Path

from entrypoints.errors import UserError
from entrypoints.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm export`."""
    parser.add_argument("source", type=Path, metavar="CKPT", help="checkpoint-N, a result, or a LoRA of glm train")
    parser.add_argument("target", type=Path, metavar="OUT", help="folder to write; appears whole or not at all")
    parser.add_argument("--base", type=Path, help="model that a LoRA was tuned on; overrides MODEL_PATH")
    parser.add_argument(
        "--dtype", choices=("auto", "keep", "float16", "bfloat16", "float32"), default="auto",
        help="precision to write; auto: a LoRA as its base, float32 as bfloat16",
    )  # fmt: skip
    parser.add_argument("--to", choices=("native", "original"), default="native", help="layout to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Export, and print the new folder."""
    from entrypoints.checkpoint.conversion import convert_to_original
    from entrypoints.training.export import export

    if args.source.resolve() == args.target.resolve():
        raise UserError(f"{args.source} is both CKPT and OUT", "write into another folder")
    base = args.base or (Path(settings.model_path) if settings.model_path else None)
    if args.to == "native":
        export(args.source, args.target, base, args.dtype, args.overwrite)
    else:
        between = args.target.with_name(f".{args.target.name}.native")
        try:
            export(args.source, between, base, args.dtype, overwrite=True)
            convert_to_original(between, args.target, "keep", args.overwrite)
        finally:
            shutil.rmtree(between, ignore_errors=True)
    print(args.target)
