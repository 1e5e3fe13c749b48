"""The training page in Streamlit: runs below a folder, read from their files every few seconds. Read-only."""

import os
import time
from pathlib import Path

import streamlit as st

from entrypoints.settings import Settings
from entrypoints.web.i18n import translate
from entrypoints.web.streamlit_layout import render_header
from entrypoints.web.training_runs.discovery import Run, find_runs
from entrypoints.web.training_runs.panels import Panels
from entrypoints.web.training_runs.status import read_training_status

REFRESH_INTERVAL_SECONDS = 5
STYLE = """<style>
.stMainBlockContainer {padding-left: clamp(1rem, 4vw, 5rem); padding-right: clamp(1rem, 4vw, 5rem)}
.st-key-charts, .st-key-metrics {display: grid; gap: 1rem}
.st-key-charts {grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr))}
.st-key-metrics {grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 0.5rem}
.st-key-charts > *, .st-key-metrics > * {width: 100%; min-width: 0}
</style>"""


def main() -> None:
    """Draw the header once and the runs at each refresh."""
    folder = Path(Settings.from_env(os.environ).output_dir or ".")
    language = render_header("training_title")
    st.html(STYLE)
    st.fragment(_show_runs, run_every=REFRESH_INTERVAL_SECONDS)(folder, language)


def _show_runs(folder: Path, language: str) -> None:
    panels = Panels(language)
    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption(f"{panels.text('folder')}:", width="content")
        st.text(f"{folder}", width="content")
        st.caption(panels.text("updated", time=time.strftime("%H:%M:%S")), width="content")
    chosen = _choose(find_runs(folder), language)
    found = {run.name: status for run in chosen if (status := read_training_status(run.folder))}
    if not found:
        st.info(panels.text("no_training_log"))
        return
    if len(found) == 1:
        (status,) = found.values()
        panels.state(status)
        panels.metrics(status)
        panels.charts(found)
        panels.checkpoints(status)
        panels.scores(found)
        panels.evaluations(found)
        panels.samples(status)
        panels.settings(found)
        panels.log(status)
    else:
        panels.overview(found)
        panels.charts(found)
        panels.settings(found)
        panels.scores(found)
        panels.evaluations(found)


def _choose(runs: list[Run], language: str) -> list[Run]:
    """The runs that the visitor chooses, at first the newest; no choice if there is only one."""
    if len(runs) < 2:
        return runs
    names = [run.name for run in runs]
    chosen = [name for name in st.session_state.get("runs", names[:1]) if name in names]
    st.session_state["runs"] = chosen  # a run may have been removed
    selected = st.multiselect(translate(language, "runs"), names, key="runs")
    return [run for run in runs if run.name in selected]


if __name__ == "__main__":
    main()
