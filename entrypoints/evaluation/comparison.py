"""Several models on the same rows: one table of their scores, and the rows on which their answers differ most."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrypoints.evaluation.metrics import score_row
from entrypoints.evaluation.predict import PREDICTIONS_FILE, Prediction
from entrypoints.evaluation.tables import Table, markdown, page
from entrypoints.file_writing import indented_json

COMPARISON = "comparison"  # .md, .html and .json in the output folder
EXAMPLES = 5
SCORES = ("bleu_4", "rouge_1", "rouge_2", "rouge_l")
HEAD = ("model", "BLEU-4", "ROUGE-1", "ROUGE-2", "ROUGE-L", "characters", "length ratio", "repetition", "empty", "time")

LEGEND = (
    "BLEU and ROUGE in percent; characters: mean length of an answer; length ratio: answer to reference; repetition: "
    "repeated 4-grams of characters, 0 to 1; empty: answers without text; time: of all answers, without loading."
)


@dataclass(frozen=True)
class Evaluated:
    """The results of one model: its scores, the time of its answers in seconds, and the answers in their order."""

    name: str
    scores: dict[str, Any]
    seconds: float
    predictions: Sequence[Prediction]


def read_predictions(folder: Path) -> list[Prediction]:
    """The answers that `predict.evaluate` has written."""
    with (folder / PREDICTIONS_FILE).open(encoding="utf-8") as lines:  # a text can contain what `splitlines` splits at
        return [Prediction(**json.loads(line)) for line in lines]


def write_comparison(evaluated: Sequence[Evaluated], test_file: Path, output: Path) -> str:
    """Write comparison.md, comparison.html and comparison.json; returns the table of scores in Markdown."""
    scores = score_table(evaluated)
    tables = [scores, *example_tables(evaluated)]
    title = f"{test_file.name}: {', '.join(one.name for one in evaluated)}"
    text = markdown(title, tables)
    (output / f"{COMPARISON}.md").write_text(text, encoding="utf-8", errors="replace")
    (output / f"{COMPARISON}.html").write_text(page(title, tables), encoding="utf-8", errors="replace")
    values = {one.name: {**one.scores, "seconds": round(one.seconds, 3)} for one in evaluated}
    content = indented_json(values) + "\n"
    (output / f"{COMPARISON}.json").write_text(content, encoding="utf-8")
    return markdown(title, [scores])


def score_table(evaluated: Sequence[Evaluated]) -> Table:
    """One row for each model."""
    rows = []
    for one in evaluated:
        lengths = [len(row.prediction) for row in one.predictions]
        cells = [f"{one.scores[name]:.1f}" for name in SCORES]
        cells += [
            f"{sum(lengths) / len(lengths):.0f}" if lengths else "-",
            f"{one.scores['mean_length_ratio']:.2f}",
            f"{one.scores['repetition']:.2f}",
            f"{one.scores['n_empty_predictions']} of {one.scores['n']}",
            f"{one.seconds:.1f} s",
        ]
        rows.append((one.name, *cells))
    return Table("Scores", HEAD, rows, LEGEND)


def example_tables(evaluated: Sequence[Evaluated]) -> list[Table]:
    """The rows on which ROUGE-L differs most between two models, each with the answers of all."""
    tables = []
    for row, values in most_different_rows(evaluated):
        answers = [
            (one.name, f"{value:.1f}", one.predictions[row].prediction)
            for one, value in zip(evaluated, values, strict=True)
        ]
        first = evaluated[0].predictions[row]
        cells = [("question", "", first.prompt), ("reference", "", first.reference), *answers]
        tables.append(Table(f"Line {first.line}", ("", "ROUGE-L", "text"), cells))
    return tables


def most_different_rows(evaluated: Sequence[Evaluated], count: int = EXAMPLES) -> list[tuple[int, list[float]]]:
    """(position, ROUGE-L of each model) of at most `count` rows that differ, the largest difference first."""
    rows = zip(*(one.predictions for one in evaluated), strict=True)
    values = [[score_row(each.prediction, each.reference).rouge_l for each in row] for row in rows]
    different = [(position, row) for position, row in enumerate(values) if max(row) > min(row)]
    return sorted(different, key=lambda pair: min(pair[1]) - max(pair[1]))[:count]
