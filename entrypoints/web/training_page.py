"""The training page in Streamlit: how a run goes, read from its output folder every few seconds; it changes nothing."""

import os
import time
from pathlib import Path

import pandas
import streamlit as st

from entrypoints.settings import Settings
from entrypoints.web.run_record import RunRecord, read_run
from entrypoints.web.streamlit_frame import set_up
from entrypoints.web.texts import say

REFRESH_SECONDS = 5
CHARTS = (("loss", ("loss", "eval_loss")), ("learning_rate", ("learning_rate",)), ("gradient", ("grad_norm",)))
TITLES = {"grad_norm": "gradient"}  # where the Trainer's name is not the key of its text


def main() -> None:
    """The frame once, the run again and again."""
    folder = Path(Settings.from_env(os.environ).output_dir or ".")
    language = set_up("run_title")
    st.fragment(_show, run_every=REFRESH_SECONDS)(folder, language)


def _show(folder: Path, language: str) -> None:
    st.caption(f"{say(language, 'folder')}: {folder} · {say(language, 'updated', time=time.strftime('%H:%M:%S'))}")
    record = read_run(folder)
    if record is None:
        st.info(say(language, "run_missing", folder=folder))
        return
    _progress(record, language)
    _charts(record, language)
    _scores(record, language)


def _progress(record: RunRecord, language: str) -> None:
    share = record.step / record.steps if record.steps else 0.0
    st.progress(min(1.0, share), say(language, "progress", step=record.step, steps=record.steps or "?"))
    left = say(language, "finished") if record.finished else _duration(record.left, language)
    loss = record.curves.get("loss", {})
    numbers = {
        "epoch": f"{record.epoch:.2f}" if record.epoch is not None else "–",
        "loss": f"{loss[max(loss)]:.3g}" if loss else "–",
        "elapsed": _duration(record.elapsed, language),
        "left": left,
    }
    with st.container(horizontal=True):
        for key, value in numbers.items():
            st.metric(say(language, key), value, border=True, width=132)
    if record.checkpoints:
        st.caption(f"{say(language, 'checkpoints')}: {', '.join(record.checkpoints[-5:])}")


def _charts(record: RunRecord, language: str) -> None:
    with st.container(horizontal=True):
        for title, names in CHARTS:
            points = [
                (step, value, say(language, TITLES.get(name, name)))
                for name in names
                for step, value in sorted(record.curves.get(name, {}).items())
            ]
            if points:
                with st.container(border=True, width=400):
                    st.markdown(f"**{say(language, title)}**", anchors=False)
                    table = pandas.DataFrame(points, columns=["step", "value", " "])
                    several = " " if table[" "].nunique() > 1 else None  # the column's name is the legend's title
                    st.line_chart(
                        table, x="step", y="value", color=several, height=240, x_label=say(language, "step"), y_label=""
                    )


def _scores(record: RunRecord, language: str) -> None:
    st.markdown(f"##### {say(language, 'scores')}", anchors=False)
    if record.scores:
        with st.container(horizontal=True):
            for name, value in record.scores.items():
                st.metric(name, f"{value:.4g}", width=132)
    else:
        st.caption(say(language, "no_scores"))
    if record.samples:
        st.markdown(f"##### {say(language, 'samples')}", anchors=False)
        table = pandas.DataFrame(record.samples).rename(columns=lambda name: say(language, name))
        st.dataframe(table, hide_index=True, height=320, row_height=64)


def _duration(seconds: float | None, language: str) -> str:
    if seconds is None:
        return say(language, "unknown")
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


if __name__ == "__main__":
    main()
