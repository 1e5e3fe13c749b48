"""State of a training run, read from its output directory: status, training log, checkpoints, metrics, samples."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from statistics import median

from entrypoints.training.checkpoints.folders import Checkpoint, best_checkpoint, list_checkpoints
from entrypoints.training.checkpoints.run_status import PHASES, STALE_SECONDS, STATES
from entrypoints.training.output_files import (
    EVALUATION_SAMPLES_FILE,
    PREDICTIONS_FILE,
    RESULTS_FILE,
    RUN_LOG_FILE,
    RUN_STATUS_FILE,
    SCORES_FILE,
    STATE_FILE,
    TRAINING_LOG_FILE,
)
from entrypoints.web.training_runs.records import Record, read_record, read_records, read_tail, setting_text

MAX_SAMPLES = 200
LOG_LINES = 200
CURVES = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_gib")
SAMPLE_FIELDS = ("prompt", "reference", "prediction")
SILENT_INTERVALS = 10  # without a status file, a run counts as stopped after so many intervals of its log
RUN_FILES = (RUN_STATUS_FILE, TRAINING_LOG_FILE, STATE_FILE, RESULTS_FILE, SCORES_FILE, PREDICTIONS_FILE)


@dataclass
class TrainingStatus:
    """A run at one moment; `curves` maps a name such as loss to {step: value}, times are in seconds.

    state: running, stopped, failed or finished. is_silent: the run ended without saying why, as when it was killed.
    """

    state: str = ""
    phase: str = ""
    message: str = ""  # why it failed or stopped
    is_silent: bool = False
    last_sign: float | None = None  # of the run, unix time
    step: int = 0
    total_steps: int | None = None
    epoch: float | None = None
    elapsed_seconds: float | None = None
    remaining_seconds: float | None = None
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    best: Checkpoint | None = None  # of the lowest validation loss
    scores: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    evaluations: dict[int, list[dict[str, str]]] = field(default_factory=dict)  # samples by step
    settings: dict[str, str] = field(default_factory=dict)
    log: str = ""
    problems: list[tuple[str, str]] = field(default_factory=list)  # file, field of a wrong type

    def newest(self, curve: str) -> float | None:
        """The last value of a curve."""
        values = self.curves.get(curve)
        return values[max(values)] if values else None


def read_training_status(folder: Path, now: float | None = None) -> TrainingStatus | None:
    """The run in an --output-dir; None if it has no records yet. now: unix time."""
    status = TrainingStatus(log=read_tail(folder / RUN_LOG_FILE, LOG_LINES))
    run = read_record(folder / RUN_STATUS_FILE)
    first_step = _add_run(status, run)
    if status.phase == PHASES[0] and first_step == 0:  # the files are those of the run that was here before
        _add_state(status, now, [])
        return status
    times = _add_log(status, read_records(folder / TRAINING_LOG_FILE))
    _add_checkpoints(status, folder)
    results = read_record(folder / RESULTS_FILE)
    if not status.state and results.values:
        status.state = "finished"
    _add_scores(status, read_record(folder / SCORES_FILE))
    status.samples = [_sample(record) for record in islice(read_records(folder / PREDICTIONS_FILE), MAX_SAMPLES)]
    _add_evaluations(status, read_records(folder / EVALUATION_SAMPLES_FILE))
    if not (status.state or status.curves or status.scores or status.samples or status.step):
        return None
    _add_state(status, now, times)
    _add_durations(status, times, run, results)
    return status


def _add_run(status: TrainingStatus, run: Record) -> int:
    """What the run itself says; returns its first step."""
    state, phase = run.text("state"), run.text("phase")
    status.state = state if state in STATES else ""
    status.phase = phase if phase in PHASES else ""
    status.message = run.text("message")
    status.last_sign = run.count("heartbeat") if status.state else None
    status.total_steps = run.step("total_steps") or None
    status.settings = run.texts("settings")
    first_step = run.step("first_step") or 0
    _report(status, run)
    return first_step


def _add_state(status: TrainingStatus, now: float | None, times: list[tuple[int, float]]) -> None:
    """Running, or stopped without saying so; a run without a status file is judged by its log."""
    now = time.time() if now is None else now
    if not status.state and not times:
        return  # predictions or a state alone do not tell
    if not status.state:
        intervals = [after - before for (_, before), (_, after) in pairwise(times)]
        limit = max(STALE_SECONDS, SILENT_INTERVALS * median(intervals)) if intervals else STALE_SECONDS
        status.state, status.last_sign = "running", times[-1][1]
    else:
        limit = STALE_SECONDS
    if status.state == "running" and now - (status.last_sign or 0.0) > limit:
        status.state, status.is_silent = "stopped", True


def _add_log(status: TrainingStatus, events: Iterable[Record]) -> list[tuple[int, float]]:
    """Add the curves of the training log; returns step and unix time of the first event of each step.

    Where the step falls, another run of the same folder begins, or one goes back to a checkpoint: what was logged at
    this step and later was replaced.
    """
    times: dict[int, float] = {}
    previous = 0
    for event in events:
        step = event.step()
        if step is None:
            _report(status, event)
            continue
        if step < previous:
            for values in (times, *status.curves.values()):
                for later in [one for one in values if one >= step]:
                    del values[later]
        previous = status.step = step
        epoch, moment = event.count("epoch"), event.count("time")
        status.epoch = status.epoch if epoch is None else epoch
        if moment is not None:
            times.setdefault(step, moment)
        for name in CURVES:
            value = event.number(name)
            if value is not None:
                status.curves.setdefault(name, {})[step] = value
        _report(status, event)
    status.curves = {name: values for name, values in status.curves.items() if values}
    return sorted(times.items())


def _add_checkpoints(status: TrainingStatus, folder: Path) -> None:
    """The complete checkpoints, and what only the Trainer's state has: the number of steps of a run without a status.

    The step is that of the log, which is newer; a state that ends before it is that of another run.
    """
    status.checkpoints = list_checkpoints(folder)
    status.best = best_checkpoint(status.checkpoints)
    if not status.settings and status.checkpoints:
        config = status.checkpoints[-1].run_config
        status.settings = {setting_text(name): setting_text(value) for name, value in config.items()}
    total: int | None = None
    for path in (*(checkpoint.folder for checkpoint in status.checkpoints), folder):
        state = read_record(path / STATE_FILE)
        step, epoch, last = state.step("global_step"), state.count("epoch"), state.step("max_steps")
        _report(status, state, path.name if path != folder else "")
        total = last or total
        if step and step > status.step and not status.curves:
            status.step = step
            status.epoch = status.epoch if epoch is None else epoch
    if status.total_steps is None and total and total >= status.step:
        status.total_steps = total


def _add_scores(status: TrainingStatus, scores: Record) -> None:
    numbers = {name: value for name, value in scores.values.items() if type(value) in (int, float)}
    known = Record(scores.name, numbers)
    found = {name: known.number(name) for name in numbers}
    status.scores = {setting_text(name): value for name, value in found.items() if value is not None}
    _report(status, known)


def _add_evaluations(status: TrainingStatus, records: Iterable[Record]) -> None:
    previous = -1
    for record in records:
        step = record.step()
        if step is not None:
            if step != previous:  # what was written before the run went back is replaced
                status.evaluations = {one: rows for one, rows in status.evaluations.items() if one < step}
            previous = step
            rows = status.evaluations.setdefault(step, [])
            if len(rows) < MAX_SAMPLES:
                rows.append(_sample(record))


def _add_durations(status: TrainingStatus, times: list[tuple[int, float]], run: Record, results: Record) -> None:
    """Time so far and time left; the median pace is not distorted by the pause before a resumed run."""
    runtime, started = results.count("train_runtime"), run.count("started")
    pace = None
    if len(times) > 1:
        pace = max(0.0, median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(times)))  # a clock may be set back
        status.elapsed_seconds = pace * status.step
    if status.state == "finished" and runtime is not None:
        status.elapsed_seconds = runtime
    elif started is not None and status.last_sign and not run.step("first_step"):
        status.elapsed_seconds = max(0.0, status.last_sign - started)
    if status.state == "running" and pace is not None and status.total_steps:
        status.remaining_seconds = pace * max(0, status.total_steps - status.step)
    _report(status, results)


def _sample(record: Record) -> dict[str, str]:
    return {name: setting_text(record.values.get(name, "")) for name in SAMPLE_FIELDS}


def _report(status: TrainingStatus, record: Record, folder: str = "") -> None:
    """Remember the fields of a wrong type, each once."""
    name = f"{folder}/{record.name}" if folder else record.name
    for problem in record.problems:
        if (name, problem) not in status.problems:
            status.problems.append((name, problem))
    record.problems.clear()
