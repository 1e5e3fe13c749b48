"""The side bar of the Streamlit page: conversations and settings."""

import streamlit as st

from entrypoints.web.browser_storage import PLACE_TEXTS, export_conversation
from entrypoints.web.client import ApiClient, ModelInfo
from entrypoints.web.conversation import title_of
from entrypoints.web.i18n import translate
from entrypoints.web.message_rendering import plain_markdown
from entrypoints.web.request_errors import ErrorMessage
from entrypoints.web.session import ChatOptions, ChatSession, slider_ranges
from entrypoints.web.transcript import model_label

CONNECTION_ERRORS = ("unreachable", "loading", "needs_key", "wrong_key", "busy")


def draw_sidebar(api: ApiClient, language: str) -> None:
    """The key of each setting is the name of its field in ChatOptions."""
    with st.sidebar:
        _conversations(st.session_state.chat, language)
        with st.expander(translate(language, "settings"), expanded=True):
            _settings(api, language)


def load_models(api: ApiClient) -> None:
    """Ask the server for its models."""
    state = st.session_state
    models = state.chat.api_for(api, state.get("key", "")).list_models()
    if isinstance(models, ErrorMessage):
        state.chat.error = models
        return
    state.models = models
    if state.chat.error and state.chat.error.key in CONNECTION_ERRORS:
        state.chat.error = None


def _conversations(session: ChatSession, language: str) -> None:
    session.kept.synchronize()
    session.kept.put(session.conversation)
    label = translate(language, "search")
    search = st.text_input(label, key="search", placeholder=label, label_visibility="collapsed")
    entries = session.kept.entries(search)
    if entries:
        st.caption(translate(language, "conversations"))
    # no radio: Streamlit knows its options by their texts, and two conversations may have the same title
    with st.container(key="conversations", gap=None):
        for title, id_ in entries:
            text = plain_markdown(title)
            st.button(
                f"**{text}**" if id_ == session.conversation.id else text, key=f"open-{id_}", type="tertiary",
                width="stretch", on_click=_open, args=(id_,),
            )  # fmt: skip
    with st.expander(translate(language, "manage")):
        _manage(session, language)


def _open(id_: str) -> None:
    session: ChatSession = st.session_state.chat
    session.open(session.kept.get(id_))


def _manage(session: ChatSession, language: str) -> None:
    state = st.session_state
    st.caption(translate(language, PLACE_TEXTS[session.kept.place]))
    state.rename = session.conversation.title
    st.text_input(translate(language, "rename"), key="rename", on_change=_rename)
    for kind in ("export_markdown", "export_json", "export", "export_all"):
        file = export_conversation(session, language, kind)
        st.download_button(
            translate(language, kind), file.get("text", ""), file.get("name", kind), file.get("type"), key=kind,
            disabled=not file, on_click="ignore", width="stretch",
            help=None if file or kind != "export" else translate(language, "nothing_to_export"),
        )  # fmt: skip
    st.file_uploader(translate(language, "import_file"), "json", key="import_file", on_change=_import)
    if not state.get("confirms_delete"):
        st.button(
            translate(language, "delete_conversation"), key="delete_conversation", on_click=_confirm, args=(True,)
        )
    else:
        with st.container(horizontal=True):
            text = translate(language, "confirm_delete_conversation")
            st.button(text, key="confirm_delete_conversation", on_click=_delete, type="primary")
            st.button(translate(language, "cancel"), key="cancel", on_click=_confirm, args=(False,))


def _rename() -> None:
    state = st.session_state
    if state.rename.strip() and state.chat.conversation.nodes:
        state.chat.conversation.title = state.rename.strip()


def _import() -> None:
    state = st.session_state
    if state.import_file is None:
        return
    found = state.chat.kept.add_from(state.import_file.getvalue().decode(errors="replace"))
    if isinstance(found, ErrorMessage):
        state.chat.error = found
    elif found:
        state.chat.open(found[0])
        state.chat.kept.unwritten = [each.id for each in found]


def _confirm(is_asked: bool) -> None:
    st.session_state.confirms_delete = is_asked


def _delete() -> None:
    st.session_state.chat.delete()
    _confirm(False)


def _settings(api: ApiClient, language: str) -> None:
    models: dict[str, ModelInfo] = {model.name: model for model in st.session_state.models}

    def label(name: str | None) -> str:
        return model_label(models[name], language) if name in models else str(name)

    model = st.selectbox(translate(language, "model"), list(models), format_func=label, key="model")
    others = [name for name in models if name != model]
    st.selectbox(
        translate(language, "compare_model"), others, format_func=label, key="compare_model", index=None,
        placeholder=translate(language, "no_comparison"),
    )  # fmt: skip
    st.button(translate(language, "refresh"), key="refresh", on_click=load_models, args=(api,), width="stretch")
    _system_prompt(language)
    _sliders(models[model].context_length if model else None, language)
    if st.toggle(translate(language, "tool_mode"), key="tool_mode"):
        st.session_state.setdefault("tools", ChatOptions.tools)
        st.text_area(translate(language, "tools"), key="tools", height=260)
    st.text_input(translate(language, "key"), key="key", type="password", on_change=load_models, args=(api,))


def _system_prompt(language: str) -> None:
    prompts: list[str] = st.session_state.setdefault("prompts", [])
    if prompts:
        st.selectbox(
            translate(language, "saved_prompts"), prompts, key="saved_prompt", index=None, on_change=_use_prompt,
            format_func=lambda prompt: f"{prompts.index(prompt) + 1}. {title_of(prompt)}",  # no text twice, as above
        )  # fmt: skip
    st.text_area(translate(language, "system"), key="system", placeholder=translate(language, "system_hint"), height=80)
    with st.container(horizontal=True):
        st.button(translate(language, "save_prompt"), key="save_prompt", on_click=_save_prompt)
        if prompts:
            st.button(translate(language, "remove_prompt"), key="remove_prompt", on_click=_remove_prompt)


def _use_prompt() -> None:
    st.session_state.system = st.session_state.saved_prompt or ""


def _save_prompt() -> None:
    state = st.session_state
    if state.system.strip() and state.system not in state.prompts:
        state.prompts = [*state.prompts, state.system]


def _remove_prompt() -> None:
    state = st.session_state
    state.prompts = [prompt for prompt in state.prompts if prompt != state.saved_prompt]


def _sliders(context_length: int | None, language: str) -> None:
    for name, given in slider_ranges(context_length).items():
        label, is_whole = translate(language, name), isinstance(given.step, int)
        number = int if is_whole else float  # Streamlit requires one type for all values
        value = st.session_state.get(name, given.default)
        st.session_state[name] = number(min(max(value, given.minimum), given.maximum))
        st.slider(label, number(given.minimum), number(given.maximum), step=number(given.step), key=name)
