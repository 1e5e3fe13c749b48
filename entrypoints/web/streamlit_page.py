"""The chat page in Streamlit, for `glm web --ui streamlit` and for `streamlit run` on this file.

Streamlit runs this script anew at each click. An answer grows in a thread of its own, so whatever a visitor clicks
meanwhile, the next run goes on showing it. Each visitor has a Talk in their own session.
"""

import os
from dataclasses import fields

import streamlit as st
from streamlit.runtime import get_instance
from streamlit.runtime.scriptrunner import get_script_run_ctx

from entrypoints.settings import Settings
from entrypoints.web.client import Answering, Api, Model, Problem
from entrypoints.web.display import bubbles, for_streamlit, status
from entrypoints.web.streamlit_frame import set_up
from entrypoints.web.talk import Options, Talk, sliders
from entrypoints.web.texts import say

TICK_SECONDS = 0.08
RETRY_SECONDS = 4
DEFAULT_API = "http://127.0.0.1:8000/v1"


def main() -> None:
    """One run: settings, the talk so far, the field below it, and the growing answer."""
    settings = Settings.from_env(os.environ)
    api = Api(settings.api_url or DEFAULT_API, settings.api_key.value)
    language = set_up("title", "centered")
    state = st.session_state
    if "talk" not in state:
        state.talk, state.problem, state.models = Talk(), None, []
        _find_models(api)
    _settings(api)
    # Streamlit lets a run that a click ended go on beside the next one until its next call: either may take the answer
    answering = state.talk.answering
    chat = st.container()
    _below(api)
    with chat:
        _conversation(state.talk, answering, language)


def _settings(api: Api) -> None:
    """The side bar; the key of each widget is the name of its field in Options."""
    state, language = st.session_state, st.session_state.language
    models: dict[str, Model] = {model.name: model for model in state.models}

    def label(name: str) -> str:
        parent = models[name].parent
        return say(language, "adapter_of", name=name, parent=parent) if parent else name

    with st.sidebar:
        model = st.selectbox(say(language, "model"), list(models), format_func=label, key="model")
        st.button(say(language, "refresh"), key="refresh", on_click=_find_models, args=(api,), width="stretch")
        st.text_area(say(language, "system"), key="system", placeholder=say(language, "system_hint"), height=80)
        for name, slider in sliders(models[model].window if model else None).items():
            kind = int if isinstance(slider.step, int) else float
            bounds = (slider.lowest, slider.highest, slider.default, slider.step)
            st.slider(say(language, name), *map(kind, bounds), key=name)
        if st.toggle(say(language, "tool_mode"), key="tool_mode"):
            st.text_area(say(language, "tools"), Options.tools, key="tools", height=260)
        st.text_input(say(language, "key"), key="key", type="password", on_change=_find_models, args=(api,))


def _options() -> Options:
    """The settings as they are now; a click's own run may have been cut short before it drew them."""
    return Options(**{field.name: st.session_state.get(field.name, field.default) for field in fields(Options)})


def _find_models(api: Api) -> None:
    state = st.session_state
    found = api.with_key(state.get("key", "")).models()
    if isinstance(found, Problem):
        state.problem = found
    else:
        state.models, state.problem = found, None


def _conversation(talk: Talk, answering: Answering | None, language: str) -> None:
    """All that was said; while an answer grows, this lasts until its end and then starts a new run."""
    shown = list(bubbles(talk, language, for_streamlit))
    growing = shown.pop() if answering and talk.answering is answering and not answering.growth.calls else None
    if not shown and not growing:
        st.markdown(say(language, "empty"), text_alignment="center")
    for bubble in shown:
        with st.chat_message(bubble.role):
            st.markdown("\n\n".join(part for part in (bubble.title, bubble.markdown) if part), anchors=False)
            if bubble.role == "assistant":
                with st.popover(say(language, "copy"), type="tertiary", width="content"):
                    st.code(bubble.raw, language=None, wrap_lines=True)
    if answering:
        with st.chat_message("assistant"):
            _grow(answering, language)
        if taken := talk.take():
            st.session_state.problem = taken.problem
        st.rerun()


def _grow(answering: Answering, language: str) -> None:
    box, session = st.empty(), get_script_run_ctx().session_id
    try:
        while not answering.done.wait(TICK_SECONDS):
            # this call is also where a click, such as stop, ends this run
            box.markdown(for_streamlit(answering.growth.text) or say(language, "waiting"), anchors=False)
    finally:
        if not get_instance().is_active_session(session):
            answering.stop()  # the visitor has gone


def _below(api: Api) -> None:
    """Banner, status, buttons and field, at the lower edge."""
    state, talk, language = st.session_state, st.session_state.talk, st.session_state.language
    with st.bottom:
        if state.problem:
            st.warning(say(language, state.problem.key, **state.problem.values).replace("$", r"\$"))
            if state.problem.key in ("down", "loading"):
                st.fragment(_look_again, run_every=RETRY_SECONDS)(api)
        if line := say(language, "waiting") if talk.answering else status(talk, language):
            st.caption(line)
        with st.container(horizontal=True, gap="small"):
            _buttons(api, talk, language)
    waiting = talk.waiting_calls()
    hint = say(language, "observation", name=waiting[0]["function"]["name"]) if waiting else say(language, "question")
    # not in the container above: only at the top level does the page follow a growing answer
    st.chat_input(hint, key="question", disabled=bool(talk.answering), on_submit=_ask, args=(api,))


def _buttons(api: Api, talk: Talk, language: str) -> None:
    busy, rows = bool(talk.answering), talk.training_rows()
    if busy:
        st.button(say(language, "stop"), key="stop", on_click=talk.stop, type="primary")
    else:
        st.button(say(language, "regenerate"), key="regenerate", on_click=_again, args=(api,))
    st.button(say(language, "edit"), key="edit", on_click=_take_back, disabled=busy)
    st.button(say(language, "clear"), key="clear", on_click=talk.clear, disabled=busy)
    st.download_button(
        say(language, "export"), rows, "conversation.jsonl", "application/jsonl", key="export",
        disabled=busy or not rows, on_click="ignore", help=None if rows else say(language, "nothing_to_export"),
    )  # fmt: skip


def _look_again(api: Api) -> None:
    _find_models(api)
    if not st.session_state.problem:
        st.rerun()


def _ask(api: Api) -> None:
    state = st.session_state
    if state.question and state.question.strip():
        state.talk.take()
        state.talk.say(state.question)
        state.problem = state.talk.start(api, _options())


def _again(api: Api) -> None:
    talk = st.session_state.talk
    talk.take()
    if talk.forget_answer():
        st.session_state.problem = talk.start(api, _options())


def _take_back() -> None:
    st.session_state.talk.take()
    st.session_state.question = st.session_state.talk.forget_question() or ""


if __name__ == "__main__":
    main()
