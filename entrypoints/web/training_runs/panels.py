"""The parts of the training page in Streamlit. Text of files is in tables and code blocks, which show it as typed."""

import time
from collections.abc import Mapping
from typing import Any

import streamlit as st

from entrypoints.web.i18n import translate
from entrypoints.web.training_runs.charts import Curve, chart
from entrypoints.web.training_runs.comparison import (
    Runs,
    answers_at,
    curves_by_run,
    different_settings,
    evaluation_steps,
    scores_by_name,
)
from entrypoints.web.training_runs.status import CURVES, TrainingStatus

Charts = dict[str, tuple[Mapping[str, Curve], Mapping[str, int]]]  # title: curves, steps that are marked
ROW_HEIGHT = 64  # of a table with long texts
LOG_HEIGHT = 320
CHART_HEIGHT = 240
STATE_KEYS = {"running": "running", "stopped": "stopped", "failed": "failed_run", "finished": "finished"}
STATE_COLORS = {"running": "blue", "stopped": "orange", "failed": "red", "finished": "green"}


class Panels:
    """Draws runs in one language."""

    def __init__(self, language: str) -> None:
        self.language = language

    def text(self, key: str, **values: object) -> str:
        """A text of the page."""
        return translate(self.language, key, **values)

    def state(self, status: TrainingStatus) -> None:
        """Running, stopped, failed or finished, with the reason, the progress, and what the files have wrong."""
        with st.container(horizontal=True, vertical_alignment="center"):
            if status.state:
                st.badge(self.state_name(status), color=STATE_COLORS[status.state])  # type: ignore[arg-type]
            if status.state == "running" and status.phase in ("preparing", "checking"):
                st.caption(self.text(status.phase), width="content")
        if status.is_silent:
            moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.last_sign))
            st.warning(self.text("silent", time=moment))
        elif status.state == "stopped":
            st.warning(self.text("stopped_by", signal=status.message if status.message.isalnum() else "?"))
        if status.state == "failed":
            st.error(self.text("failure"))
            st.code(status.message, language=None, wrap_lines=True)
        if status.problems:
            st.warning(self.text("wrong_types"))
            st.code("\n".join(f"{file}: {name}" for file, name in status.problems), language=None, wrap_lines=True)
        share = status.step / status.total_steps if status.total_steps else 0.0
        st.progress(min(1.0, share), self.text("progress", step=status.step, total=status.total_steps or "?"))

    def state_name(self, status: TrainingStatus) -> str:
        """The name of the state in the language of the page."""
        return self.text(STATE_KEYS[status.state]) if status.state else self.text("unknown")

    def metrics(self, status: TrainingStatus) -> None:
        """The newest values."""
        remaining = "–" if status.state != "running" else self.duration(status.remaining_seconds)
        values = {
            "epoch": "–" if status.epoch is None else f"{status.epoch:.2f}",
            "loss": number(status.newest("loss")),
            "eval_loss": number(status.newest("eval_loss")),
            "elapsed": self.duration(status.elapsed_seconds),
            "remaining": self.text("finished") if status.state == "finished" else remaining,
            "tokens_per_second": number(status.newest("tokens_per_second")),
            "memory_gib": number(status.newest("memory_gib")),
        }
        optional = ("eval_loss", "tokens_per_second", "memory_gib")
        with st.container(key="metrics"):
            for key, value in values.items():
                if value != "–" or key not in optional:
                    st.metric(self.text(key), value, border=True)

    def charts(self, runs: Runs) -> None:
        """Each curve; of one run both losses are in one chart, of several runs one curve of all is in one."""
        best = {run: status.best.step for run, status in runs.items() if status.best}
        charts: Charts = {name: (curves_by_run(runs, name), best if name == "eval_loss" else {}) for name in CURVES}
        if len(runs) == 1:
            (status,) = runs.values()
            both = {self.text(name): status.curves.get(name, {}) for name in CURVES[:2]}
            best_step = {self.text("eval_loss"): step for step in best.values()}
            charts = {"losses": (both, best_step), **{name: charts[name] for name in CURVES[2:]}}
        with st.container(key="charts"):
            for title, (curves, marked) in charts.items():
                if any(curves.values()):
                    with st.container(border=True):
                        st.markdown(f"**{self.text(title)}**", anchors=False)
                        st.vega_lite_chart(
                            spec=chart(curves, marked, self.text("step")), height=CHART_HEIGHT, alt=self.text(title)
                        )

    def checkpoints(self, status: TrainingStatus) -> None:
        """The complete checkpoints, the one of the lowest validation loss marked."""
        if not status.checkpoints:
            return
        self.heading("checkpoints")
        rows = [
            {
                self.text("checkpoint"): checkpoint.folder.name,
                self.text("step"): checkpoint.step,
                self.text("eval_loss"): checkpoint.eval_loss,
                self.text("best"): "★" if checkpoint == status.best else "",
            }
            for checkpoint in reversed(status.checkpoints)
        ]
        self.table(rows, "checkpoints")

    def overview(self, runs: Runs) -> None:
        """One line for each run."""
        rows = [
            {
                self.text("run"): run,
                self.text("state"): self.state_name(status),
                self.text("step"): f"{status.step} / {status.total_steps or '?'}",
                self.text("loss"): status.newest("loss"),
                self.text("eval_loss"): status.newest("eval_loss"),
                self.text("best"): status.best.folder.name if status.best else "",
                self.text("tokens_per_second"): status.newest("tokens_per_second"),
                self.text("memory_gib"): status.newest("memory_gib"),
                self.text("elapsed"): self.duration(status.elapsed_seconds),
            }
            for run, status in runs.items()
        ]
        self.table(rows, "runs")

    def scores(self, runs: Runs) -> None:
        """The scores of the evaluation."""
        self.heading("scores")
        scores = scores_by_name(runs)
        if not scores:
            st.caption(self.text("no_scores"))
            return
        single = {run: self.text("value") for run in runs} if len(runs) == 1 else {}
        rows: list[dict[str, Any]] = [
            {self.text("score"): name, **{single.get(run, run): number(value) for run, value in values.items()}}
            for name, values in scores.items()
        ]
        self.table(rows, "scores")

    def evaluations(self, runs: Runs) -> None:
        """The answers to validation rows at the evaluation that the visitor chooses, at first the newest."""
        steps = evaluation_steps(runs)
        if not steps:
            return
        self.heading("evaluations")
        chosen = steps[-1]
        if len(steps) > 1:
            chosen = st.select_slider(self.text("step"), steps, steps[-1], key=f"evaluation-{len(steps)}")
        single = dict.fromkeys(runs, "prediction") if len(runs) == 1 else {}
        answers = answers_at(runs, chosen)
        rows = [{self.column(single.get(name, name)): text for name, text in row.items()} for row in answers]
        self.table(rows, "evaluations", ROW_HEIGHT)

    def samples(self, status: TrainingStatus) -> None:
        """Predictions for the test rows."""
        if status.samples:
            self.heading("samples")
            rows = [{self.text(name): text for name, text in sample.items()} for sample in status.samples]
            self.table(rows, "samples", ROW_HEIGHT)

    def settings(self, runs: Runs) -> None:
        """The settings of one run, or those that differ between several."""
        if len(runs) == 1:
            (status,) = runs.values()
            if status.settings:
                with st.expander(self.text("run_settings")):
                    rows = [
                        {self.text("setting"): name, self.text("value"): value}
                        for name, value in status.settings.items()
                    ]
                    self.table(rows, "run_settings")
            return
        self.heading("different_settings")
        different = different_settings(runs)
        if different:
            rows = [{self.text("setting"): name, **values} for name, values in different.items()]
            self.table(rows, "different_settings")
        else:
            st.caption(self.text("same_settings"))

    def log(self, status: TrainingStatus) -> None:
        """The end of the log, open where the reader needs the reason of an end."""
        if status.log:
            with (
                st.expander(self.text("log"), expanded=status.state in ("failed", "stopped")),
                st.container(height=LOG_HEIGHT, border=False, autoscroll=True),
            ):
                st.code(status.log, language=None, wrap_lines=True)

    def heading(self, key: str) -> None:
        """A heading of a part."""
        st.markdown(f"##### {self.text(key)}", anchors=False)

    def column(self, name: str) -> str:
        """The heading of a column of answers: a word of the page, or the name of a run."""
        return self.text(name) if name in ("prompt", "reference", "prediction") else name

    def table(self, rows: list[dict[str, Any]], key: str, row_height: int | None = None) -> None:
        """A table, which shows all text as typed."""
        st.dataframe(rows, hide_index=True, row_height=row_height, alt=self.text(key))

    def duration(self, seconds: float | None) -> str:
        """Hours, minutes and seconds."""
        if seconds is None:
            return self.text("unknown")
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{rest:02}"


def number(value: float | None) -> str:
    """A value with four digits."""
    return "–" if value is None else f"{value:.4g}"
