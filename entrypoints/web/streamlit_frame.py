"""What both pages of Streamlit begin with: title, style, and the choice of language."""

import streamlit as st

from entrypoints.web.texts import LANGUAGES, language_of, say

STYLE = """<style>
.stMainBlockContainer {padding-top: 3.75rem; padding-bottom: 1rem}
.stChatMessage {overflow-wrap: anywhere}
.stChatMessage .katex-display {overflow-x: auto; overflow-y: hidden}
[data-testid="stMetricValue"] div {line-height: 2rem}
</style>"""


def set_up(title: str, layout: str = "wide") -> str:
    """Begin a run; the language: the browser's, until the visitor chooses."""
    st.session_state.setdefault("language", language_of(st.context.locale))
    heading = say(st.session_state.language, title)
    st.set_page_config(page_title=heading, page_icon="💬", layout=layout)
    st.html(STYLE)
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.markdown(f"#### {heading}", width="content", anchors=False)
        st.radio(
            "language", LANGUAGES, format_func=LANGUAGES.get, key="language", horizontal=True,
            label_visibility="collapsed", width="content",
        )  # fmt: skip
    return st.session_state.language
