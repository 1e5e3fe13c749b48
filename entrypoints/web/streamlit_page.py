"""The chat page in Streamlit, for `glm web --ui streamlit` and for `streamlit run` on this file.

Streamlit runs this script again after each click. An answer is streamed in its own thread, so the next run of the
script continues to show it. Each visitor's ChatSession is in their session state.
"""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit.runtime import get_instance
from streamlit.runtime.scriptrunner import get_script_run_ctx

from entrypoints.settings import Settings
from entrypoints.web.client import ApiClient
from entrypoints.web.conversation_database import ConversationDatabase
from entrypoints.web.documents import read_document
from entrypoints.web.feedback import FeedbackFile
from entrypoints.web.i18n import negotiate_language, translate
from entrypoints.web.message_actions import MessageActions
from entrypoints.web.message_rendering import plain_markdown
from entrypoints.web.request_errors import ErrorMessage
from entrypoints.web.session import ChatOptions, ChatSession, RunningAnswer
from entrypoints.web.streamlit_browser import connect_browser, count_click, restore
from entrypoints.web.streamlit_layout import render_header
from entrypoints.web.streamlit_messages import MessageWidgets
from entrypoints.web.streamlit_sidebar import draw_sidebar, load_models
from entrypoints.web.transcript import error_text, input_hint, status_line, waiting_text
from entrypoints.web.visitors import Visitors, is_of_another_user

UPDATE_INTERVAL_SECONDS = 0.08
RETRY_INTERVAL_SECONDS = 4
DEFAULT_API_URL = "http://127.0.0.1:8000/v1"
EXAMPLES = ("example_1", "example_2", "example_3", "example_4")
DOCUMENT_TYPES = ("txt", "md", "csv", "json", "jsonl", "log", "py")


def main() -> None:
    """One run of the script: settings, conversation, input area, answers in progress."""
    settings = Settings.from_env(os.environ)
    api = ApiClient(settings.api_url or DEFAULT_API_URL, settings.api_key.value)
    feedback = FeedbackFile(Path(settings.feedback_dir)) if settings.feedback_dir else None
    state = st.session_state
    if "chat" not in state:
        state.chat, state.models, state.copied = ChatSession(), [], None
        _visitors(settings).welcome(state.chat, st.context.headers)
        load_models(api)
    if is_of_another_user(state.chat, st.context.headers):
        st.error(translate(negotiate_language(st.context.locale), "other_user"))
        st.stop()
    restore(state.chat)
    language = render_header("title", "centered")
    actions = MessageActions(api, feedback)
    draw_sidebar(api, language)
    # A run that a click ended continues beside the next one until its next Streamlit call: either may finish an answer
    running = dict(state.chat.running)
    messages = st.container()
    _input_area(api, language, bool(feedback))
    with messages:
        _conversation(MessageWidgets(state.chat, actions, language, current_options), api)
    connect_browser(state.chat, language)
    if running:
        _finish(state.chat, api, running)


def _visitors(settings: Settings) -> Visitors:
    place, folder = settings.conversations, Path(settings.page_state_dir)
    database = ConversationDatabase(folder) if place == "server" and settings.page_state_dir else None
    return Visitors(settings.page_users_file, place, database)


def current_options() -> ChatOptions:
    """The current settings; a click may have ended its run before the widgets were drawn."""
    return ChatOptions(**{field.name: st.session_state.get(field.name, field.default) for field in fields(ChatOptions)})


def _conversation(widgets: MessageWidgets, api: ApiClient) -> None:
    """All messages, on one side or two; while answers are in progress, this lasts until their end."""
    session = widgets.session
    if not session.conversation.nodes:
        st.markdown(translate(widgets.language, "empty"), text_alignment="center")
        with st.container(horizontal=True, horizontal_alignment="center", key="examples"):
            for key in EXAMPLES:
                question = translate(widgets.language, key)
                st.button(plain_markdown(question), key=key, on_click=_ask, args=(api, question))
        return
    sides = len(session.conversation.leaves)
    columns = st.columns(sides) if sides > 1 else [st.container()]
    boxes = []
    for side, column in enumerate(columns):
        with column:
            boxes.append(widgets.draw_side(side))
    if session.running:
        _stream_answers(widgets, boxes)


def _stream_answers(widgets: MessageWidgets, boxes: list[Any]) -> None:
    """Draw the answers until their end; they are stopped if the visitor has left."""
    session, context = widgets.session, get_script_run_ctx()
    tasks = [running.task for running in session.running.values()]
    try:
        while not all(task.done.wait(UPDATE_INTERVAL_SECONDS) for task in tasks):
            # a click, such as on Stop, ends this run inside this call
            for side, box in enumerate(boxes):
                widgets.update(side, box)
    finally:
        if context is None or not get_instance().is_active_session(context.session_id):
            session.finish_answers()


def _finish(session: ChatSession, api: ApiClient, running: dict[int, RunningAnswer]) -> None:
    """Append the answers, run demo tools that they call, and start a new run of the script."""
    if session.running == running:
        session.finish_answers()
        if not session.error:
            session.run_demo_tools(api, current_options())
    st.rerun()


def _input_area(api: ApiClient, language: str, has_feedback: bool) -> None:
    """Banner, status line, buttons and input field, at the bottom of the page."""
    session: ChatSession = st.session_state.chat
    # in one container: an input field that changes its position loses the focus, and with it what is being typed
    with st.bottom, st.container():
        if session.error:
            st.warning(error_text(session.error, language).replace("$", r"\$"))
            if session.error.key in ("unreachable", "loading"):
                st.fragment(_retry_connection, run_every=RETRY_INTERVAL_SECONDS)(api)
        first = session.running.get(0)
        if line := waiting_text(first, language) if first else status_line(session, language):
            st.container(key="status").caption(line)
        if has_feedback:
            st.caption(translate(language, "feedback_notice"))
        with st.container(horizontal=True, gap="small"):
            if session.running:
                st.button(translate(language, "stop"), key="stop", on_click=_stop, type="primary")
            st.button(translate(language, "clear"), key="clear", on_click=session.open)
    # not in the container above: only at the top level does the page scroll along with an answer
    st.chat_input(
        input_hint(session, language), key="question", on_submit=_submit, args=(api,),
        accept_file=True, file_type=DOCUMENT_TYPES, max_upload_size=4,
    )  # fmt: skip


def _stop() -> None:
    st.session_state.chat.stop_answers()
    count_click()


def _retry_connection(api: ApiClient) -> None:
    load_models(api)
    if not st.session_state.chat.error:
        st.rerun()


def _submit(api: ApiClient) -> None:
    value, session, options = st.session_state.question, st.session_state.chat, current_options()
    text = value.text
    if session.running:
        st.session_state.question = text  # the draft stays in the field
        return
    for file in value.files:
        content = _decoded(file.getvalue())
        found = read_document(file.name, content, session.api_for(api, options.key), options.model or "")
        if isinstance(found, ErrorMessage):
            session.error = found
            st.session_state.question = text
            return
        session.document = found
    if text.strip() and not session.ask(api, options, text):
        st.session_state.question = text


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _ask(api: ApiClient, question: str) -> None:
    st.session_state.chat.ask(api, current_options(), question)


if __name__ == "__main__":
    main()
