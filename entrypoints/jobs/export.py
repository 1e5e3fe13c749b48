"""Write a checkpoint of glm train, its ZeRO shards or its LoRA as a plain model folder."""

import argparse
from pathlib import Path

from entrypoints.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm export`."""
    parser.add_argument("source", type=Path, metavar="CKPT", help="checkpoint-N, a result, or a LoRA of glm train")
    parser.add_argument("target", type=Path, metavar="OUT", help="folder to write, atomically")
    parser.add_argument("--base", type=Path, help="model that a LoRA was trained on; overrides MODEL_PATH")
    parser.add_argument(
        "--dtype", choices=("auto", "keep", "float16", "bfloat16", "float32"), default="auto",
        help="precision to write; auto: a LoRA in that of its base, float32 as bfloat16",
    )  # fmt: skip
    parser.add_argument("--to", choices=("native", "original"), default="native", help="layout to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Export, and print the new folder."""
    from entrypoints.training.result.export import ExportOptions, export

    base = args.base or (Path(settings.model_path) if settings.model_path else None)
    export(args.source, args.target, ExportOptions(base, args.dtype, args.overwrite), args.to)
    print(args.target)
