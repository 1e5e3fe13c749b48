"""Check training data before it costs GPU time, convert it to messages, or split off a development set."""

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrypoints.chat_format.prompt import TEMPLATES, split_answer
from entrypoints.dataset.columns import add_column_flags, add_max_skipped_flag, columns_of_flags
from entrypoints.dataset.convert import convert
from entrypoints.dataset.quality import check
from entrypoints.dataset.reader import Example, require_columns, stream_examples, stream_rows
from entrypoints.dataset.split import SplitOptions, split, write_split
from entrypoints.file_writing import indented_json
from entrypoints.settings import Settings

logger = logging.getLogger(__name__)
FILE_HELP = "JSON, CSV, Parquet or Arrow file, also compressed; a folder or a glob of parts"

if TYPE_CHECKING:
    Subcommands = argparse._SubParsersAction[argparse.ArgumentParser]
    FormatterClass = argparse._FormatterClass


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the subcommands check, convert and split."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="check|convert|split")
    _add_check(actions, parser.formatter_class)
    _add_convert(actions, parser.formatter_class)
    _add_split(actions, parser.formatter_class)


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Print the report of the subcommand to stdout.

    Raises UserError: an invalid file, column or size.
    """
    if args.action == "check":
        print(_check(args, settings))
    else:
        print(_convert(args) if args.action == "convert" else _split(args))


def _add_check(actions: "Subcommands", formatter_class: "FormatterClass") -> None:
    parser = _subcommand(
        actions, formatter_class, "check", "report lengths, skipped rows, duplicates and <UNK> in a file"
    )
    parser.add_argument("file", type=Path, metavar="FILE", help=FILE_HELP)
    add_column_flags(parser)
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="model whose tokens are counted; overrides MODEL_PATH"
    )
    parser.add_argument("--template", choices=TEMPLATES, help="prompt format; that of the model if omitted")
    parser.add_argument("--source-prefix", help="text before each question; that of the model if omitted")
    parser.add_argument("--max-source-length", type=_positive, default=512, help="maximum length of a prompt in tokens")
    parser.add_argument(
        "--max-target-length", type=_positive, default=512, help="maximum length of a response in tokens"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _add_convert(actions: "Subcommands", formatter_class: "FormatterClass") -> None:
    parser = _subcommand(
        actions, formatter_class, "convert", "write rows of any shape as messages, in UTF-8 JSON lines"
    )
    parser.add_argument("source", type=Path, metavar="SRC", help=FILE_HELP)
    parser.add_argument("target", type=Path, metavar="DST", help="file to write, such as messages.jsonl")
    add_column_flags(parser)
    add_max_skipped_flag(parser, 0)
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")


def _add_split(actions: "Subcommands", formatter_class: "FormatterClass") -> None:
    parser = _subcommand(
        actions, formatter_class, "split", "write OUT/train.jsonl and OUT/dev.jsonl as UTF-8 JSON lines"
    )
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="AdvertiseGen folder, a .tar or .tar.gz of it, or a single file"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="output folder for train.jsonl and dev.jsonl")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--dev-rows", type=_positive, help="size of the development set taken from a single file, in rows"
    )
    size.add_argument(
        "--dev-share", type=float, help="size of the development set as a share of all rows, such as 0.05"
    )
    parser.add_argument("--seed", type=int, default=SplitOptions().seed, help="random seed that selects the rows")
    parser.add_argument("--encoding", default="utf-8", help="encoding of the source; use gb18030 for GBK files")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files in OUT")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")


def _subcommand(
    actions: "Subcommands", formatter_class: "FormatterClass", name: str, text: str
) -> argparse.ArgumentParser:
    return actions.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        formatter_class=formatter_class,
        allow_abbrev=False,
    )


def _check(args: argparse.Namespace, settings: Settings) -> str:
    columns = columns_of_flags(args)
    require_columns(args.file, args.encoding, columns)
    model = args.model or (Path(settings.model_path) if settings.model_path else None)
    counter = _token_counter(model, args) if model else None
    rows = stream_rows(args.file, args.encoding)
    report = check(rows, columns, counter, args.max_source_length, args.max_target_length)
    report = replace(report, file=str(args.file))
    unit = f"tokens of {model}" if model else "characters"
    logger.info("read %d rows of %s; lengths are in %s", report.rows, args.file, unit)
    return _as_json(report.as_dict()) if args.json else report.as_text()


def _convert(args: argparse.Namespace) -> str:
    columns = columns_of_flags(args)
    rows = stream_examples(stream_rows(args.source, args.encoding), columns, args.source)
    count = convert(rows, args.target, args.max_skipped, args.overwrite)
    return f"{args.target}: {count:,} rows"


def _split(args: argparse.Namespace) -> str:
    result = split(args.source, args.encoding, SplitOptions(args.dev_rows, args.dev_share, args.seed))
    train, dev = write_split(result, args.out, args.overwrite)
    if result.shared:
        logger.warning("%d development rows are also training rows: scores on them are too optimistic", result.shared)
    if args.json:
        counts = {"train_rows": len(result.train), "dev_rows": len(result.dev), "shared_rows": result.shared}
        return _as_json({"train": str(train), "dev": str(dev), **counts})
    return f"{train}: {len(result.train)} rows\n{dev}: {len(result.dev)} rows"


def _token_counter(model: Path, args: argparse.Namespace) -> Callable[[Example], tuple[int, int]]:
    """Lengths of prompt (with role tags and history) and response in tokens of a model, as training counts them.

    The function raises UserError for a row that training skips because the limits do not hold its role tags.
    """
    from entrypoints.checkpoint.prompt_file import read_prompt_format
    from entrypoints.checkpoint.tokenizer import load_tokenizer

    overrides = {"template": args.template, "source_prefix": args.source_prefix}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    tokenizer, prompt_format = load_tokenizer(model), replace(read_prompt_format(model), **overrides)

    def count(example: Example) -> tuple[int, int]:
        turns = example.messages()
        untruncated = prompt_format.encode_for_training(turns, tokenizer, sys.maxsize, sys.maxsize)
        prompt = len(prompt_format.encode(split_answer(turns)[0], tokenizer))
        answer = len(untruncated.ids) - prompt - 1
        if prompt > args.max_source_length or answer > args.max_target_length:
            prompt_format.encode_for_training(turns, tokenizer, args.max_source_length, args.max_target_length)
        return prompt, answer

    return count


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def _as_json(fields: dict[str, Any]) -> str:
    return indented_json(fields)
