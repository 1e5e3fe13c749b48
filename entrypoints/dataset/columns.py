"""The columns that flags select, and the flags themselves, which every command that reads rows has."""

import argparse
from dataclasses import dataclass

FORMATS = (
    "auto",
    "columns",
    "alpaca",
    "sharegpt",
    "messages",
    "prompt-completion",
    "prompt-response",
    "firefly",
    "moss",
)
Parser = argparse.ArgumentParser | argparse._ArgumentGroup


@dataclass(frozen=True, slots=True)
class Columns:
    """What flags say about the columns; None: as the shape of the rows has it.

    format: one of FORMATS; `auto` recognizes the shape from the first rows. With a prompt or response column the shape
    is `columns`, and nothing but the named columns is used.
    conversations: instead of the others, the column with all turns.
    rejected: column with the answer that is not preferred; then the rows are preference rows.
    may_lack_history: no error if no row has the history column; set for files beside the one that the flag is for.
    """

    prompt: str | None = None
    response: str | None = None
    history: str | None = None
    conversations: str | None = None
    input: str | None = None
    system: str | None = None
    format: str = "auto"
    rejected: str | None = None
    may_lack_history: bool = False

    def flags(self) -> dict[str, str]:
        """The command line flag of each column that is named, with the name."""
        names = {
            "--prompt-column": self.prompt,
            "--response-column": self.response,
            "--rejected-column": self.rejected,
            "--input-column": self.input,
            "--history-column": self.history,
            "--system-column": self.system,
            "--conversations-column": self.conversations,
        }
        return {flag: name for flag, name in names.items() if name is not None}


def add_column_flags(parser: Parser) -> None:
    """The flags that say how rows are read."""
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help="shape of the rows; auto recognizes it from the first rows",
    )
    parser.add_argument("--prompt-column", help="column with the question, if no known shape has it")
    parser.add_argument("--response-column", help="column with the answer, if no known shape has it")
    parser.add_argument("--input-column", help="column with text that is added to the question, as Alpaca's input")
    parser.add_argument("--history-column", help="column with earlier turns: pairs, objects or a flat list")
    parser.add_argument("--system-column", help="column with the system text")
    parser.add_argument("--conversations-column", help="instead of these: column with all turns of a conversation")
    parser.add_argument("--encoding", default="utf-8", help="encoding of text files; use gb18030 for GBK files")


def add_max_skipped_flag(parser: Parser, default: int | None) -> None:
    """How many rows may be skipped; None: any number, which the command reports."""
    text = "number of rows that may be skipped because they cannot be used"
    parser.add_argument(
        "--max-skipped", type=int, default=default, help=text if default is not None else f"{text}; any if omitted"
    )


def columns_of_flags(args: argparse.Namespace) -> Columns:
    """The columns that the flags of `add_column_flags` name."""
    return Columns(
        prompt=args.prompt_column,
        response=args.response_column,
        history=args.history_column,
        conversations=args.conversations_column,
        input=args.input_column,
        system=args.system_column,
        format=args.format,
    )
