"""Check training data before it costs GPU time, or split it into a training and a development set."""

import argparse
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from entrypoints.dataset.checking import check
from entrypoints.dataset.reading import Columns, Example, require_columns, stream_rows
from entrypoints.dataset.splitting import DevSet, split, write_split
from entrypoints.prompt import TEMPLATES
from entrypoints.settings import Settings

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two words follow: check or split."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="check|split")
    _add_check(actions)
    _add_split(actions)


def run(args: argparse.Namespace, settings: Settings) -> int | None:
    """Print the report of the chosen action to stdout.

    Raises UserError: anything in the file, the columns or the sizes that the user can mend.
    """
    print(_check(args, settings) if args.action == "check" else _split(args))


def _add_check(actions: argparse._SubParsersAction) -> None:
    parser = _action(actions, "check", "report lengths, skipped rows, duplicates and <UNK> in a file of rows")
    defaults = Columns()
    parser.add_argument("file", type=Path, metavar="FILE", help="JSON lines, a JSON array or objects one after another")
    parser.add_argument("--prompt-column", default=defaults.prompt, help="field with the prompt")
    parser.add_argument("--response-column", default=defaults.response, help="field with the wanted answer")
    parser.add_argument("--history-column", help="field with earlier turns, [[question, answer], ...]")
    parser.add_argument(
        "--conversations-column", help="in place of the three: field of messages, with tools, as the API takes them"
    )
    parser.add_argument("--encoding", default="utf-8", help="of the file; gb18030 reads GBK files")
    parser.add_argument("--model", type=Path, metavar="DIR", help="count this model's tokens; overrides MODEL_PATH")
    parser.add_argument("--template", choices=TEMPLATES, help="prompt format to teach; the model's if not given")
    parser.add_argument("--source-prefix", help="text in front of each question; the model's if not given")
    parser.add_argument("--max-source-length", type=_positive, default=512, help="limit of a prompt, in tokens")
    parser.add_argument("--max-target-length", type=_positive, default=512, help="limit of a response, in tokens")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _add_split(actions: argparse._SubParsersAction) -> None:
    parser = _action(actions, "split", "write OUT/train.jsonl and OUT/dev.jsonl as UTF-8 JSON lines")
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="AdvertiseGen folder, a .tar or .tar.gz of it, or a file"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for train.jsonl and dev.jsonl")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--dev-rows", type=_positive, help="rows of a single file that become the development set")
    size.add_argument("--dev-share", type=float, help="the same as a share of all rows, such as 0.05")
    parser.add_argument("--seed", type=int, default=DevSet().seed, help="the same seed draws the same rows")
    parser.add_argument("--encoding", default="utf-8", help="of the source; gb18030 reads GBK files")
    parser.add_argument("--overwrite", action="store_true", help="replace files in OUT")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")


def _action(actions: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:
    return actions.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )


def _check(args: argparse.Namespace, settings: Settings) -> str:
    columns = Columns(args.prompt_column, args.response_column, args.history_column, args.conversations_column)
    require_columns(args.file, args.encoding, columns)
    model = args.model or (Path(settings.model_path) if settings.model_path else None)
    counter = _token_counter(model, args) if model else None
    rows = stream_rows(args.file, args.encoding)
    report = check(rows, columns, counter, args.max_source_length, args.max_target_length)
    unit = f"tokens of {model}" if model else "characters"
    logger.info("read %d rows of %s; lengths in %s", report.rows, args.file, unit)
    return _as_json(report.as_dict()) if args.json else report.as_text()


def _split(args: argparse.Namespace) -> str:
    done = split(args.source, args.encoding, DevSet(args.dev_rows, args.dev_share, args.seed))
    train, dev = write_split(done, args.out, args.overwrite)
    if done.shared:
        logger.warning("%d development rows are training rows too: their scores will flatter the model", done.shared)
    if args.json:
        counts = {"train_rows": len(done.train), "dev_rows": len(done.dev), "shared_rows": done.shared}
        return _as_json({"train": str(train), "dev": str(dev), **counts})
    return f"{train}: {len(done.train)} rows\n{dev}: {len(done.dev)} rows"


def _token_counter(model: Path, args: argparse.Namespace) -> Callable[[Example], tuple[int, int]]:
    """Lengths of prompt (frame and history included) and response in a model's tokens, as training counts them.

    The counter raises UserError for a row that training skips, since the limits do not hold its frame.
    """
    from entrypoints.checkpoint.native import read_prompt_format
    from entrypoints.checkpoint.tokenizer import load_tokenizer

    given = {"template": args.template, "source_prefix": args.source_prefix}
    given = {name: value for name, value in given.items() if value is not None}
    tokenizer, prompt_format = load_tokenizer(model), replace(read_prompt_format(model), **given)

    def count(example: Example) -> tuple[int, int]:
        turns = example.messages()
        whole = prompt_format.encode_for_training(turns, tokenizer, sys.maxsize, sys.maxsize)
        prompt = len(prompt_format.encode(turns[:-1], tokenizer))
        answer = len(whole.ids) - prompt - 1
        if prompt > args.max_source_length or answer > args.max_target_length:
            prompt_format.encode_for_training(turns, tokenizer, args.max_source_length, args.max_target_length)
        return prompt, answer

    return count


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def _as_json(fields: dict) -> str:
    return json.dumps(fields, ensure_ascii=False, indent=2)
