"""report.md of a run: what it was told, the course of its loss, its scores, and answers before and after."""

import json
from collections.abc import Sequence
from dataclasses import fields

from entrypoints.training.arguments import TrainArguments

REPORT_FILE = "report.md"
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60  # characters of the curve
LINES = 20  # rows of the table of losses


def write(
    arguments: TrainArguments,
    questions: Sequence[str] = (),
    before: Sequence[str] = (),
    after: Sequence[str] = (),
    scores: dict | None = None,
) -> None:
    """Write it into the output folder of a finished run."""
    folder = arguments.output_dir
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    parts = [f"# {folder.name}", _told(arguments), _curve(losses)]
    if scores:
        parts.append(
            "## Scores\n\n" + _rows(("score", "value"), [(name, f"{value}") for name, value in scores.items()])
        )
    if questions:
        answers = list(zip(questions, before, after, strict=True))
        parts.append("## Answers\n\n" + _rows(("question", "before", "after"), answers))
    (folder / REPORT_FILE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _told(arguments: TrainArguments) -> str:
    changed = [
        (field.name, f"{getattr(arguments, field.name)}")
        for field in fields(arguments)
        if getattr(arguments, field.name) != field.default and field.name not in ("columns", "prompt_format")
    ]
    return _rows(("setting", "value"), [*changed, ("learning rate", f"{arguments.rate:g}")])


def _curve(losses: Sequence[tuple[int, float]]) -> str:
    if not losses:
        return "## Loss\n\nnothing was logged: fewer steps than --logging-steps"
    values = [value for _, value in losses]
    low, high = min(values), max(values)
    step = max(1, len(values) / WIDTH)
    picked = [values[int(place * step)] for place in range(min(WIDTH, len(values)))]
    bars = "".join(BARS[round((value - low) / ((high - low) or 1) * (len(BARS) - 1))] for value in picked)
    every = max(1, -(-len(losses) // LINES))
    table = _rows(("step", "loss"), [(f"{number}", f"{value:.4f}") for number, value in losses[::every]])
    return f"## Loss\n\n`{bars}` {values[0]:.3f} to {values[-1]:.3f}\n\n{table}"


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")
