"""report.md and report.html of a run: its settings, the loss by step, the scores, answers before and after.

The HTML page is one file that loads nothing from the network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from entrypoints.errors import UserError
from entrypoints.evaluation.tables import Table, markdown, page
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.checkpoints.folders import best_checkpoint, list_checkpoints
from entrypoints.training.checkpoints.trainer_state import read_trainer_state
from entrypoints.training.output_files import PAGE_FILE, PROBE_FILE, REPORT_FILE, STATE_FILE
from entrypoints.untrusted import read_json_file

MAX_LOSS_ROWS = 20
PROBED_ROWS = {"general": "general questions", "task": "rows of the task"}


@dataclass(frozen=True)
class Answer:
    """What the base model and the fine-tuned model answer to the same question."""

    question: str
    before: str
    after: str


def write_reports(
    arguments: TrainArguments, answers: Sequence[Answer] = (), scores: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write both files into the output folder of a finished run.

    scores: of the base model and of the result, with the same names.
    """
    folder = arguments.output_dir
    history = read_trainer_state(folder / STATE_FILE)["log_history"]
    tables = [_settings_table(arguments), _loss_table("Loss", history, "loss")]
    if any("eval_loss" in entry for entry in history):
        tables.append(_loss_table("Validation loss", history, "eval_loss"))
    best = best_checkpoint(list_checkpoints(folder))
    if best:
        row = (best.folder.name, f"{best.step}", f"{best.eval_loss:.4f}")
        tables.append(Table("Best checkpoint", ("checkpoint", "step", "validation loss"), [row]))
    tables += _probe_table(folder)
    if scores:
        tables += _score_tables(*scores)
    if answers:
        rows = [(answer.question, answer.before, answer.after) for answer in answers]
        tables.append(Table("Answers", ("question", "before", "after"), rows))
    (folder / REPORT_FILE).write_text(markdown(folder.name, tables), encoding="utf-8", errors="replace")
    (folder / PAGE_FILE).write_text(page(folder.name, tables), encoding="utf-8", errors="replace")


def _score_tables(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Table]:
    """The numbers of the base model and of the result side by side, and how they are defined."""
    numbers = [(name, f"{before[name]}", f"{after[name]}") for name in after if not isinstance(after[name], str)]
    texts = [(name, after[name]) for name in after if isinstance(after[name], str)]
    tables = [Table("Scores", ("score", "base model", "fine-tuned"), numbers)]
    return [*tables, Table("Definition of the scores", ("name", "value"), texts)] if texts else tables


def _probe_table(folder: Path) -> list[Table]:
    """Whether the task was learned and general rows were forgotten; [] for a run without a probe."""
    try:
        values = dict(read_json_file(folder / PROBE_FILE))
        rows = [
            (PROBED_ROWS.get(name, f"{name}"), f"{one['rows']}", _loss(one["before"]), _loss(one["after"]))
            for name, one in values.items()
        ]
    except (OSError, UserError, ValueError, KeyError, TypeError):
        return []
    title = "Probe: what was learned and what was forgotten"
    return [Table(title, ("rows", "number", "loss before", "loss after"), rows)]


def _loss(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "-"


def _settings_table(arguments: TrainArguments) -> Table:
    changed = [
        (field.name, _setting_text(getattr(arguments, field.name)))
        for field in fields(arguments)
        if getattr(arguments, field.name) != field.default and field.name not in ("columns", "learning_rate")
    ]
    return Table("Settings", ("setting", "value"), [*changed, ("learning rate", f"{arguments.peak_learning_rate:g}")])


def _setting_text(value: object) -> str:
    """As on the command line: several files one after the other."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else f"{value}"


def _loss_table(title: str, history: Sequence[Mapping[str, Any]], name: str) -> Table:
    """At most MAX_LOSS_ROWS rows at equal distances, the first and the last one among them."""
    logged = [entry for entry in history if isinstance(entry.get(name), int | float)]
    losses = [(f"{entry['step']}", f"{entry[name]:.4f}") for entry in logged]
    if len(losses) > MAX_LOSS_ROWS:
        last = len(losses) - 1
        losses = [losses[round(row * last / (MAX_LOSS_ROWS - 1))] for row in range(MAX_LOSS_ROWS)]
    if not losses and name == "loss":  # fewer steps than --logging-steps
        losses = [(f"1 to {entry['step']}, mean", f"{entry['train_loss']:.4f}") for entry in _summaries(history)]
    return Table(title, ("step", "loss"), losses or [("-", "nothing was logged: fewer steps than --logging-steps")])


def _summaries(history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The entry with the mean loss of the run, which the Trainer writes at its end."""
    return [entry for entry in history if isinstance(entry.get("train_loss"), int | float) and entry.get("step")][-1:]
