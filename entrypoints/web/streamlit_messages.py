"""Messages of the Streamlit page and their buttons."""

from collections.abc import Callable
from typing import Any

import streamlit as st

from entrypoints.web.i18n import translate
from entrypoints.web.message_actions import Action, MessageActions
from entrypoints.web.message_rendering import plain_markdown, to_streamlit_markdown
from entrypoints.web.session import ChatOptions, ChatSession
from entrypoints.web.streamlit_browser import count_click
from entrypoints.web.transcript import Bubble, Part, bubbles


class MessageWidgets:
    """Draws the conversation of one visitor."""

    def __init__(
        self, session: ChatSession, actions: MessageActions, language: str, options: Callable[[], ChatOptions]
    ) -> None:
        self.session, self.actions, self.language, self.options = session, actions, language, options

    def draw_side(self, side: int) -> Any:
        """All messages of one side; returns the place of the text in progress, None without one."""
        box, running = None, self.session.running.get(side)
        for bubble in bubbles(self.session, self.language, side, bool(self.actions.feedback)):
            with st.chat_message(bubble.role):
                is_growing = running and (bubble.node is None or bubble.node.id == running.continued)
                if is_growing:
                    box = st.empty()
                    with box.container():
                        self._draw_parts(bubble.parts)
                elif bubble.node and bubble.node.id == self.session.edited:
                    self._draw_edit_form(bubble)
                else:
                    self._draw_parts(bubble.parts)
                    self._draw_buttons(bubble, side)
        return box

    def update(self, side: int, box: Any) -> None:
        """Draw the text in progress again."""
        if box is None:
            return
        *_, bubble = bubbles(self.session, self.language, side)
        if len(bubble.parts) == 1 and bubble.parts[0].kind == "markdown":
            box.markdown(to_streamlit_markdown(bubble.parts[0].text), anchors=False)
        else:
            with box.container():
                self._draw_parts(bubble.parts)

    def _draw_parts(self, parts: tuple[Part, ...]) -> None:
        for part in parts:
            if part.kind == "typed":
                st.text(part.text)
            elif part.kind in ("call", "result", "failed_result", "document"):
                icon = ":material/error:" if part.kind == "failed_result" else None
                with st.expander(plain_markdown(part.title), expanded=part.kind != "document", icon=icon):
                    st.code(part.text, language="json" if part.kind == "call" else None, wrap_lines=True)
            elif part.kind == "error":
                st.markdown(f":red[{plain_markdown(part.text)}]")
            elif part.kind == "note":
                st.caption(plain_markdown(part.text))
            else:
                st.markdown(to_streamlit_markdown(part.text), anchors=False)

    def _draw_edit_form(self, bubble: Bubble) -> None:
        assert bubble.node
        label = translate(self.language, "edit_label")
        st.text_area(label, self.actions.editable_text(bubble.node), key="edit_text")
        with st.container(horizontal=True, gap="small"):
            st.button(translate(self.language, "save"), key="save", on_click=self._save, type="primary")
            st.button(translate(self.language, "cancel_edit"), key="cancel_edit", on_click=self._cancel)

    def _draw_buttons(self, bubble: Bubble, side: int) -> None:
        node = bubble.node
        if bubble.caption:
            st.caption(plain_markdown(bubble.caption))
        if node is None or not bubble.actions:
            return
        names = ("confirm_delete", "cancel") if self.session.confirmed == node.id else bubble.actions
        pressed = {1: "like", -1: "dislike"}.get(node.rating or 0)
        with st.container(horizontal=True, gap="xsmall", vertical_alignment="center"):
            if bubble.version[1] > 1:
                self._button("previous_version", side, node.id, "‹")
                st.markdown(f"{bubble.version[0]}/{bubble.version[1]}", width="content")
                self._button("next_version", side, node.id, "›")
            for name in names:
                text = translate(self.language, name)
                self._button(name, side, node.id, f"**{text}**" if name == pressed else text)

    def _button(self, name: str, side: int, node: int, text: str) -> None:
        title = translate(self.language, name) if len(text) == 1 else None
        st.button(
            text, key=f"{name}-{side}-{node}", type="tertiary", help=title, on_click=self._act,
            args=(Action(name, side, node),),
        )  # fmt: skip

    def _act(self, action: Action) -> None:
        result = self.actions.run(self.session, self.options(), action, self.language)
        if action.name != "copy":
            count_click()
        if result.copied is not None:
            st.session_state.copied = result.copied

    def _save(self) -> None:
        self.actions.save_edit(self.session, self.options(), st.session_state.edit_text)

    def _cancel(self) -> None:
        self.session.edited = None
