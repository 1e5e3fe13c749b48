"""Tables that show several runs side by side; a run is known by its name."""

from collections.abc import Mapping

from entrypoints.web.training_runs.status import TrainingStatus

Runs = Mapping[str, TrainingStatus]
ALWAYS_DIFFERENT = ("output_dir",)


def different_settings(runs: Runs) -> dict[str, dict[str, str]]:
    """The settings whose values differ, each with its value by run; empty text where a run does not have it."""
    names = dict.fromkeys(name for status in runs.values() for name in status.settings if name not in ALWAYS_DIFFERENT)
    table = {name: {run: status.settings.get(name, "") for run, status in runs.items()} for name in names}
    return {name: values for name, values in table.items() if len(set(values.values())) > 1}


def scores_by_name(runs: Runs) -> dict[str, dict[str, float | None]]:
    """Each score with its value by run."""
    names = dict.fromkeys(name for status in runs.values() for name in status.scores)
    return {name: {run: status.scores.get(name) for run, status in runs.items()} for name in names}


def curves_by_run(runs: Runs, name: str) -> dict[str, dict[int, float]]:
    """One curve of all runs that have it."""
    return {run: status.curves[name] for run, status in runs.items() if name in status.curves}


def evaluation_steps(runs: Runs) -> list[int]:
    """The steps at which any of the runs answered validation rows."""
    return sorted({step for status in runs.values() for step in status.evaluations})


def answers_at(runs: Runs, step: int) -> list[dict[str, str]]:
    """The answers at a step: prompt and reference once, with the prediction of each run that was evaluated there."""
    rows: dict[tuple[int, str], dict[str, str]] = {}
    for run, status in runs.items():
        for number, sample in enumerate(status.evaluations.get(step, [])):
            row = rows.setdefault(
                (number, sample["prompt"]), {"prompt": sample["prompt"], "reference": sample["reference"]}
            )
            row[run] = sample["prediction"]
    return list(rows.values())
