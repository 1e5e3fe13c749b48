"""report.md and report.html of a run: what it was told, the course of its loss, its scores, answers before and after.

The page is one file with the curve drawn in it; it asks nothing of any other place.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields

from entrypoints.training.arguments import TrainArguments

REPORT_FILE = "report.md"
PAGE_FILE = "report.html"
BARS = "▁▂▃▄▅▆▇█"
BAR_COUNT = 60  # characters of the curve
LINES = 20  # rows of the table of losses
WIDTH, HEIGHT, MARGIN = 760, 260, 44  # of the page's curve, in pixels
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:50em;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left;"
    "vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere}svg{max-width:100%}"
)


@dataclass(frozen=True)
class Table:
    """A heading, the names of the columns and their cells."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def write(
    arguments: TrainArguments,
    questions: Sequence[str] = (),
    before: Sequence[str] = (),
    after: Sequence[str] = (),
    scores: dict | None = None,
) -> None:
    """Write both into the output folder of a finished run."""
    folder = arguments.output_dir
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    tables = [_losses("Loss", losses), *([_losses("Loss on held-out rows", held_out)] if held_out else [])]
    if scores:
        tables.append(Table("Scores", ("score", "value"), [(name, f"{value}") for name, value in scores.items()]))
    if questions:
        answers = list(zip(questions, before, after, strict=True))
        tables.append(Table("Answers", ("question", "before", "after"), answers))
    told = _told(arguments)
    text = [f"# {folder.name}", _markdown(told), "## Loss", _bars(losses), *_sections(tables)]
    (folder / REPORT_FILE).write_text("\n\n".join(text) + "\n", encoding="utf-8")
    (folder / PAGE_FILE).write_text(_page(folder.name, told, tables, losses, held_out), encoding="utf-8")


def _told(arguments: TrainArguments) -> Table:
    changed = [
        (field.name, f"{getattr(arguments, field.name)}")
        for field in fields(arguments)
        if getattr(arguments, field.name) != field.default and field.name not in ("columns", "prompt_format")
    ]
    return Table("", ("setting", "value"), [*changed, ("learning rate", f"{arguments.rate:g}")])


def _losses(title: str, losses: Sequence[tuple[int, float]]) -> Table:
    every = max(1, -(-len(losses) // LINES))
    return Table(title, ("step", "loss"), [(f"{number}", f"{value:.4f}") for number, value in losses[::every]])


def _bars(losses: Sequence[tuple[int, float]]) -> str:
    if not losses:
        return "nothing was logged: fewer steps than --logging-steps"
    values = [value for _, value in losses]
    low, high = min(values), max(values)
    step = max(1, len(values) / BAR_COUNT)
    picked = [values[int(place * step)] for place in range(min(BAR_COUNT, len(values)))]
    bars = "".join(BARS[round((value - low) / ((high - low) or 1) * (len(BARS) - 1))] for value in picked)
    return f"`{bars}` {values[0]:.3f} to {values[-1]:.3f}"


def _sections(tables: Sequence[Table]) -> list[str]:
    first, *others = tables  # the loss has its heading and its curve already
    return [_markdown(first), *(f"## {table.title}\n\n{_markdown(table)}" for table in others)]


def _markdown(table: Table) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in table.rows]
    lines = [table.head, ["---"] * len(table.head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _page(name: str, told: Table, tables: Sequence[Table], losses: Sequence, held_out: Sequence) -> str:
    body = [f"<h1>{html.escape(name)}</h1>", _html(told), _curves(losses, held_out), *map(_html, tables)]
    head = f'<meta charset="utf-8"><title>{html.escape(name)}</title><style>{STYLE}</style>'
    return f"<!doctype html>\n<html><head>{head}</head><body>\n" + "\n".join(body) + "\n</body></html>\n"


def _html(table: Table) -> str:
    rows = "\n".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    title = f"<h2>{html.escape(table.title)}</h2>\n" if table.title else ""
    return f"{title}<table><tr>{head}</tr>\n{rows}</table>"


def _curves(losses: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]]) -> str:
    """The losses over the steps; held-out ones as dots."""
    every = [*losses, *held_out]
    if not every:
        return ""
    last = max(step for step, _ in every)
    low, high = min(value for _, value in every), max(value for _, value in every)

    def place(step: int, value: float) -> tuple[float, float]:
        across = MARGIN + (WIDTH - 2 * MARGIN) * step / last
        return across, MARGIN + (HEIGHT - 2 * MARGIN) * (high - value) / ((high - low) or 1)

    points = " ".join("{:.1f},{:.1f}".format(*place(*entry)) for entry in losses)
    dots = "".join('<circle cx="{:.1f}" cy="{:.1f}" r="4" fill="#c40"/>'.format(*place(*entry)) for entry in held_out)
    labels = [(4, MARGIN, f"{high:.3f}"), (4, HEIGHT - MARGIN, f"{low:.3f}"), (WIDTH - MARGIN, HEIGHT - 8, f"{last}")]
    words = "".join(f'<text x="{x}" y="{y}" font-size="12">{text}</text>' for x, y, text in labels)
    axes = f"M{MARGIN} {MARGIN // 2}V{HEIGHT - MARGIN // 2}H{WIDTH - MARGIN}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="loss over steps">'
        f'<path d="{axes}" fill="none" stroke="#999"/>'
        f'<polyline points="{points}" fill="none" stroke="#06c" stroke-width="2"/>{dots}{words}</svg>'
    )
