"""Common top of the Streamlit pages: title, style and language selection."""

import html
from typing import Literal

import streamlit as st

from entrypoints.web.i18n import LANGUAGES, negotiate_language, translate
from entrypoints.web.user_sign_in import user_name

STYLE = """<style>
.stMainBlockContainer {padding-top: 3.75rem; padding-bottom: 1rem}
.stChatMessage {overflow-wrap: anywhere}
.stChatMessage [data-testid=stText] > * {white-space: pre-wrap}
.stChatMessage :is(p, li, h1, h2, h3, h4, td, th), .stChatMessage [data-testid=stText] > * {
  unicode-bidi: plaintext; text-align: start}
[data-testid=stSidebar][data-collapsed=true] * {visibility: hidden} /* its fields are no stops of the Tab key */
.stChatMessage .katex-display {overflow-x: auto; overflow-y: hidden}
.st-key-conversations {max-height: 30vh; overflow-y: auto; flex-wrap: nowrap}
.st-key-conversations button {justify-content: start; min-height: 2rem; padding-block: .25rem}
.st-key-conversations button > *, .st-key-conversations button p {
  overflow: hidden; text-overflow: ellipsis; white-space: nowrap; text-align: start}
/* a contrast of 4.5 to the background */
.stApp [data-testid=stCaptionContainer], .stApp [data-testid=stCaptionContainer] p {
  opacity: 1; color: light-dark(#5f6368, #b0b3b8)}
.stApp code .keyword {color: light-dark(#0b5cad, #83c9ff) !important}
.stApp [data-testid=stBaseButton-primary] p {color: light-dark(#fff, #111827)}
[data-testid="stMetricValue"] div {line-height: 2rem}
</style>"""


def render_header(title_key: str, layout: Literal["centered", "wide"] = "wide") -> str:
    """Configure the page and draw its header; returns the language: the browser's until the visitor chooses one."""
    st.session_state.setdefault("language", negotiate_language(st.context.locale))
    language: str = st.session_state.language
    title = translate(language, title_key)
    st.set_page_config(page_title=title, page_icon="💬", layout=layout)
    st.html(STYLE)
    user = user_name(st.context.headers)
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.markdown(f"#### {title}", width="content", anchors=False)
        if user:
            sign_out = translate(language, "sign_out")
            st.html(f'{html.escape(user)} · <a href="sign-out" target="_self">{sign_out}</a>', width="content")
        st.radio(
            "language", LANGUAGES, format_func=LANGUAGES.__getitem__, key="language", horizontal=True,
            label_visibility="collapsed", width="content",
        )  # fmt: skip
    return language
