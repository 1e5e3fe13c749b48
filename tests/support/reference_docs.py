"""Generates the command reference (help texts, settings) and the table of methods and cards of the training guide.

.venv/bin/python tests/support/reference_docs.py
"""

import math
import os
import sys
from argparse import ArgumentParser, _SubParsersAction
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from entrypoints.__main__ import COMMANDS, build_command_parser  # noqa: E402
from entrypoints.hardware.cards import Card  # noqa: E402
from entrypoints.settings import Secret, Settings  # noqa: E402
from entrypoints.training.arguments import TrainArguments  # noqa: E402
from entrypoints.training.launch import ProcessLayout  # noqa: E402
from entrypoints.training.preflight.planning import plan_memory  # noqa: E402

REFERENCE = REPOSITORY / "entrypoints" / "jobs" / "README.md"
TRAINING_GUIDES = [REPOSITORY / "entrypoints" / "training" / name for name in ("README.md", "README.zh-CN.md")]
PLAN_START, PLAN_END = "<!-- generated: methods and cards -->", "<!-- end -->"
PLANNED_GPUS = ((1, 24), (4, 24), (1, 48), (1, 80), (2, 80), (8, 80))  # number, GB of each
PLANNED_METHODS = (
    "qlora",
    "lora",
    "ptuning",
    "freeze",
    "full",
    "full --deepspeed zero2",
    "full --deepspeed zero3",
    "full --deepspeed zero3-offload",
)
PLANNED_SETTINGS: dict[str, dict[str, Any]] = {
    "": {},
    "ᶜ": {"gradient_checkpointing": True},
    "¹": {"gradient_checkpointing": True, "per_device_train_batch_size": 1},
}
COMMAND = ".venv/bin/python tests/support/reference_docs.py"
COLUMNS = "100"  # width of the help texts
INTRODUCTION = f"""# Command reference

[中文](README.zh-CN.md)

This page is generated from the `--help` texts and from `entrypoints/settings.py` with
`{COMMAND}`.

`glm COMMAND --help` prints the same text. `--train_file` and `--train-file` are the same flag. Results go to
stdout, logs to stderr. Exit codes: 0 success, 1 user error (one line with problem and remedy), 2 wrong usage,
130 interrupted (Ctrl-C), 143 terminated (SIGTERM, as `docker stop` and Kubernetes send it; `glm serve` and `glm web`
complete their requests then and exit with 0).
"""
SETTINGS = """## Settings

Every setting is an environment variable. A flag overrides a variable, a variable overrides the default; an empty
variable counts as unset. A secret can be read from a file: `API_KEY_FILE` for `API_KEY`.

| variable | default | meaning |
|---|---|---|
"""


def render() -> str:
    """The whole page; independent of the terminal and of this machine."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = COLUMNS
    try:
        sections = [_command_section(name) for name in COMMANDS]
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    return "\n".join([INTRODUCTION, _overview(), *sections, _settings_table()])


def _overview() -> str:
    rows = "\n".join(f"| [`glm {name}`](#glm-{name}) | {summary} |" for name, summary in COMMANDS.items())
    return f"| command | purpose |\n|---|---|\n{rows}\n"


def _command_section(name: str) -> str:
    parser = build_command_parser(name)
    texts = [_help_text(parser), *(_help_text(each) for each in _subcommands(parser))]
    return "\n".join([f"## glm {name}\n", *(f"```text\n{text}```\n" for text in texts)])


def _subcommands(parser: ArgumentParser) -> list[ArgumentParser]:
    groups = [action for action in parser._actions if isinstance(action, _SubParsersAction)]
    return [subparser for group in groups for subparser in group.choices.values()]


def _help_text(parser: ArgumentParser) -> str:
    return "\n".join(line.rstrip() for line in parser.format_help().splitlines()) + "\n"


def _settings_table() -> str:
    rows = []
    for setting in fields(Settings):
        default = "" if setting.type is Secret or not setting.default else f"`{setting.default}`"
        rows.append(f"| `{setting.name.upper()}` | {default} | {setting.metadata['description']} |")
    return SETTINGS + "\n".join(rows) + "\n"


def with_plan_table(text: str) -> str:
    """A training guide with the current table of methods and cards between its markers."""
    before, rest = text.split(PLAN_START)
    return f"{before}{PLAN_START}\n{plan_table()}{PLAN_END}{rest.split(PLAN_END)[1]}"


def plan_table() -> str:
    """Memory of one GPU for fine-tuning the 6B: a row for each method, a column for each set of cards."""
    head = "| |" + "".join(f" {count} × {gigabytes} GB |" for count, gigabytes in PLANNED_GPUS)
    rows = [
        f"| `{name}` |" + "".join(f" {_planned_cell(name, *gpus)} |" for gpus in PLANNED_GPUS)
        for name in PLANNED_METHODS
    ]
    return "\n".join([head, "|---" * (len(PLANNED_GPUS) + 1) + "|", *rows]) + "\n"


def _planned_cell(name: str, count: int, gigabytes: int) -> str:
    """GB of a GPU with the first settings that fit, and their mark; with offloading also the host memory."""
    card = Card("", gigabytes * 1e9)
    method, _, deepspeed = name.partition(" --deepspeed ")
    for mark, changes in PLANNED_SETTINGS.items():
        if method == "ptuning" and "gradient_checkpointing" in changes:
            changes = {field: value for field, value in changes.items() if field != "gradient_checkpointing"}
        arguments = TrainArguments(
            Path("THUDM/chatglm3-6b"), Path("rows"), Path("out"), method=method, deepspeed=deepspeed or None, **changes
        )
        estimate = (
            plan_memory(replace(arguments, train_file=()), card).with_longest_rows(ProcessLayout(count)).estimate()
        )
        if estimate.fits(card.memory, math.inf):
            host = f" + {estimate.host(True) / 1e9:.0f}" if "offload" in name else ""
            return f"{estimate.gpu / 1e9:.0f}{host}{mark}"
    return "–"


if __name__ == "__main__":
    REFERENCE.write_text(render(), encoding="utf-8")
    for guide in TRAINING_GUIDES:
        guide.write_text(with_plan_table(guide.read_text(encoding="utf-8")), encoding="utf-8")
