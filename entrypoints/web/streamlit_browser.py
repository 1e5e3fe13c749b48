"""What the Streamlit page does in the browser, as a component of Streamlit: storage, clipboard, document language."""

import functools
import json
from typing import Any

import streamlit as st

from entrypoints.web.browser_script import BROWSER_SCRIPT
from entrypoints.web.browser_storage import KEPT_SETTINGS, restored_settings, stored_values
from entrypoints.web.session import ChatSession

SCRIPT = (
    "if (!window.page) {"
    + BROWSER_SCRIPT
    + """}
export default function({data, setStateValue}) {
  const page = window.page;
  page.setLanguage(data.language);
  if (data.changes && data.changes !== page.written) page.write(page.written = data.changes);
  if (data.settings && page.isRestored) page.saveSettings(data.settings);
  if (data.copied && data.copied.number !== page.copiedNumber) {
    page.copiedNumber = data.copied.number;
    page.copy(data.copied.text);
  }
  if (data.focus !== null && data.focus !== page.focusNumber) {  // the clicked button is gone
    page.focusNumber = data.focus;
    if (document.activeElement === document.body) page.focus("[data-testid=stChatInputTextArea]");
  }
  if (!page.isRestored) {
    page.isRestored = true;
    setStateValue("stored", page.read());
  }
}
"""
)


@functools.cache
def _component() -> Any:
    return st.components.v2.component("glm.browser", js=SCRIPT)


def count_click() -> None:
    """A button disappears with this click: the input field gets the focus."""
    st.session_state.num_clicks = st.session_state.get("num_clicks", 0) + 1


def restore(session: ChatSession) -> None:
    """Take over what the browser kept, once, before the widgets are drawn."""
    state = st.session_state
    stored = (state.get("browser") or {}).get("stored")
    if not stored or state.get("is_restored"):
        return
    state.is_restored = True
    found = stored_values(stored)
    session.kept.restore(found.get("conversations") or "[]")
    current = session.kept.conversations.get(found.get("current") or "")
    if current and not session.conversation.nodes:
        session.conversation = current
    settings = restored_settings(found.get("settings"))
    state.prompts = settings.pop("prompts", [])
    settings.pop("theme", None)
    for name, value in settings.items():
        state[name] = value


def connect_browser(session: ChatSession, language: str) -> None:
    """Send the conversation and the settings to the browser, and a text for the clipboard."""
    state = st.session_state
    session.kept.put(session.conversation)
    changes = session.changes() if state.get("is_restored") else ""
    copied, state.copied = state.copied, None
    if copied is not None:
        state.num_copied = state.get("num_copied", 0) + 1
    values = [state.get(name) for name in KEPT_SETTINGS]
    values[KEPT_SETTINGS.index("prompts")] = json.dumps(state.get("prompts", []), ensure_ascii=False)
    values[KEPT_SETTINGS.index("theme")] = "system"
    _component()(
        key="browser",
        data={
            "language": language,
            "changes": changes,
            "settings": values if state.get("is_restored") else None,
            "focus": state.get("num_clicks", 0) if not session.running else None,
            "copied": {"text": copied, "number": state.num_copied} if copied is not None else None,
        },
        default={"stored": ""},
        on_stored_change=lambda: None,
    )
