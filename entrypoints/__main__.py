"""The `glm` command: one job per word, and only the chosen job is imported."""

import argparse
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence

from entrypoints import logs
from entrypoints.errors import UserError
from entrypoints.settings import LOG_FORMATS, LOG_LEVELS, Settings

JOBS = {
    "download": "fetch a ChatGLM3 checkpoint from a hub or a mirror",
    "convert": "turn the original layout into one that plain transformers loads, and back",
    "prepare": "fill a model store once: download, convert, quantise, or make the demo's toy",
    "verify": "check every file of a checkpoint against its manifest",
    "data": "check or split training data",
    "train": "fine-tune on prompt/response rows, in full or as an adapter",
    "export": "write a checkpoint of a run as a plain model folder",
    "quantize": "write a checkpoint smaller: a GGUF file, which runs without GPU and torch, or a folder",
    "evaluate": "generate answers and score them with BLEU-4 and ROUGE",
    "chat": "talk to a model in the terminal",
    "serve": "serve a model over OpenAI's HTTP API",
    "web": "chat in the browser, or watch a training run",
    "key": "add an API key to the key file of serve",
    "demo": "make, convert, tune, score and talk to a toy model",
    "doctor": "show what this machine offers and what is missing",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job; returns its exit code: 0 done, 1 a user's mistake, 2 wrong usage, 130 interrupted.

    Raises whatever a defect raises; a user's mistake only with --debug.
    """
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):  # a C locale must not end in a UnicodeEncodeError
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    argv = [_dashes(word) for word in (sys.argv[1:] if argv is None else argv)]
    try:
        return _run(argv)
    except UserError as error:
        if "--debug" in argv:
            raise
        print(f"glm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("glm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(argv: list[str]) -> int:
    try:
        job, args = _parse(argv)
        settings = Settings.from_env(os.environ)
        logs.set_up(args.log_format or settings.log_format, args.log_level or settings.log_level, settings.secrets())
        return job.run(args, settings) or 0
    finally:
        if sys.stdout:  # None where the caller closed it
            sys.stdout.flush()  # a broken pipe shows here, not after main


def _parse(argv: list[str]) -> tuple:
    table = "\n".join(f"  {name:10} {line}" for name, line in JOBS.items())
    top = argparse.ArgumentParser(
        prog="glm",
        usage="glm JOB [flags]",
        description="Build, tune and run a private large model on ChatGLM3-6B.",
        epilog=f"jobs:\n{table}\n\n`glm JOB --help` shows the flags of a job.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("job", choices=JOBS, metavar="JOB", help="one of the jobs below")
    name = top.parse_args(argv[:1]).job
    job = importlib.import_module(f"entrypoints.jobs.{name}")
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--log-format", choices=LOG_FORMATS, help="overrides LOG_FORMAT")
    common.add_argument("--log-level", choices=LOG_LEVELS, help="overrides LOG_LEVEL")
    parser = argparse.ArgumentParser(
        prog=f"glm {name}",
        description=job.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        parents=[common],
        allow_abbrev=False,
    )
    job.add_arguments(parser)
    given, rest = common.parse_known_args(argv[1:])  # first, so that they may also stand after a word such as `check`
    given.words = argv[1:]  # a job that starts itself again in other processes says the same
    return job, parser.parse_args(rest, given)


def _dashes(word: str) -> str:
    """`--train_file=x_y` and `--train-file=x_y` are the same flag; only the name is touched."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _terminate(number: int, frame: object) -> None:
    """SIGTERM unwinds the stack, so that what was half written is removed."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
