"""The `glm` command line; only the module of the selected command is imported."""

import argparse
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from entrypoints import logs
from entrypoints.errors import UserError
from entrypoints.hardware.resources import limit_garbage_collection, limit_openmp_spinning
from entrypoints.settings import LOG_FORMATS, LOG_LEVELS, Settings

COMMANDS = {
    "download": "download a checkpoint from a hub or a mirror",
    "convert": "convert between the original layout and the one that plain transformers loads",
    "prepare": "fill a model store once: download, convert, quantize, or create the demo model",
    "verify": "check every file of a checkpoint against its manifest",
    "data": "check, convert or split training data",
    "train": "fine-tune on your rows, all parameters or an adapter",
    "export": "write a checkpoint of a run as a plain model folder",
    "quantize": "quantize a checkpoint to a GGUF file, which runs without GPU and torch, or to a folder",
    "evaluate": "generate answers and score them with BLEU-4 and ROUGE",
    "chat": "chat with a model in the terminal",
    "serve": "serve a model over OpenAI's HTTP API",
    "web": "chat in the browser, or watch a training run",
    "key": "add an API key to the key file of glm serve",
    "user": "add a user to the users file of glm web",
    "usage": "print the requests and tokens of each API key and day",
    "demo": "create, convert, fine-tune, evaluate and query a demo model",
    "doctor": "show the hardware of this machine and what is missing",
}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of a flag, unless it is unset."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 success, 1 user error, 2 wrong usage, 130 interrupted (SIGINT).

    SIGTERM ends the process with 143; `glm serve` and `glm web` complete their requests and end with 0.

    Raises UserError, and OSError that names a file: only with --debug. Any other exception is a bug and is not caught.
    """
    signal.signal(signal.SIGTERM, _exit_on_signal)
    for stream in (sys.stdout, sys.stderr):  # no UnicodeEncodeError in a C locale
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    argv = [_normalize_flag(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    try:
        return _run(argv)
    except BrokenPipeError:  # the reader of our output closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        problem = _user_error(error)
        if "--debug" in argv or not problem:
            raise
        print(f"glm: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("glm: interrupted", file=sys.stderr)
        return 130


def _user_error(error: UserError | OSError) -> UserError | None:
    """The error to print; None for an OSError that names no file, which is a bug."""
    if isinstance(error, UserError):
        return error
    if not isinstance(error.filename, str):
        return None
    from entrypoints.checkpoint.atomic_files import access_error

    return access_error(error)


def _run(argv: list[str]) -> int:
    try:
        limit_garbage_collection()
        module, args = parse_arguments(argv)
        limit_openmp_spinning(os.environ, argv)  # before torch or llama.cpp load their OpenMP library
        settings = Settings.from_env(os.environ)
        logs.configure(args.log_format or settings.log_format, args.log_level or settings.log_level, settings.secrets())
        return module.run(args, settings) or 0
    finally:
        if sys.stdout:  # None if the parent process closed it
            sys.stdout.flush()  # raises BrokenPipeError here instead of after main


def parse_arguments(argv: list[str]) -> tuple[Any, argparse.Namespace]:
    """The module of the command in `entrypoints.jobs`, and its arguments. Exits on wrong usage and on --help."""
    name = build_main_parser().parse_args(argv[:1]).command
    module = importlib.import_module(f"entrypoints.jobs.{name}")
    # parsed first, so that common flags can also follow a subcommand such as `check`
    common, rest = _common_parser().parse_known_args(argv[1:])
    common.words = argv[1:]  # `glm train` starts worker processes with the same arguments
    return module, build_command_parser(name).parse_args(rest, common)


def build_main_parser() -> argparse.ArgumentParser:
    """The parser of `glm` itself, which lists the commands."""
    table = "\n".join(f"  {name:10} {summary}" for name, summary in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="glm",
        usage="glm COMMAND [flags]",
        description="Build, fine-tune and serve a private large language model on ChatGLM3-6B.",
        epilog=f"commands:\n{table}\n\n`glm COMMAND --help` shows the flags of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    return parser


def build_command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one command, with the flags that all commands share."""
    module = importlib.import_module(f"entrypoints.jobs.{name}")
    parser = argparse.ArgumentParser(
        prog=f"glm {name}",
        description=module.__doc__,
        formatter_class=_HelpFormatter,
        parents=[_common_parser()],
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return parser


def _common_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--log-format", choices=LOG_FORMATS, help="overrides LOG_FORMAT")
    parser.add_argument("--log-level", choices=LOG_LEVELS, help="overrides LOG_LEVEL")
    return parser


def _normalize_flag(argument: str) -> str:
    """`--train_file=x_y` becomes `--train-file=x_y`; only the name of the flag is changed."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds the stack, so that partially written files are removed."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
