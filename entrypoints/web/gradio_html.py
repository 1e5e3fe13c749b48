"""Bubbles of the conversation as messages of gr.Chatbot: Markdown or HTML, each followed by a row of buttons."""

from collections.abc import Iterator
from typing import Any

from entrypoints.web.i18n import translate
from entrypoints.web.message_rendering import card_html, escape_html, to_gradio_markdown, typed_html
from entrypoints.web.session import ChatSession
from entrypoints.web.transcript import Bubble, Part, bubbles

Message = dict[str, Any]  # of gr.Chatbot


def chat_messages(session: ChatSession, language: str, side: int, feedback: bool) -> list[Message]:
    """The messages of one side in the format of gr.Chatbot."""
    return [
        {"role": bubble.role, "content": content}
        for bubble in bubbles(session, language, side, feedback)
        for content in _contents(bubble, session, language, side)
    ]


def _contents(bubble: Bubble, session: ChatSession, language: str, side: int) -> Iterator[str]:
    notes = [part for part in bubble.parts if part.kind in ("note", "error")]
    shown = [part for part in bubble.parts if part not in notes] or notes
    yield from (_part(part) for part in shown)
    footer = [_part(part) for part in notes if part not in shown]
    if bubble.node and bubble.actions:
        is_confirming = session.confirmed == bubble.node.id
        names = ("confirm_delete", "cancel") if is_confirming else bubble.actions
        pressed = {1: "like", -1: "dislike"}.get(bubble.node.rating or 0)
        buttons = [_button(name, f"{side}.{bubble.node.id}", language, name == pressed) for name in names]
        footer.append(f'<div class="actions">{_versions(bubble, side, language)}{"".join(buttons)}</div>')
    if bubble.caption:
        footer.append(f'<div class="caption">{escape_html(bubble.caption)}</div>')
    if footer:
        yield f'<div class="footer">{"".join(footer)}</div>'


def _part(part: Part) -> str:
    if part.kind == "typed":
        return typed_html(part.text)
    if part.kind in ("call", "result", "failed_result", "document"):
        return card_html(part.title, part.text, part.kind)
    if part.kind in ("note", "error"):
        return f'<div class="{part.kind}">{escape_html(part.text)}</div>'
    return to_gradio_markdown(part.text)


def _button(name: str, target: str, language: str, is_pressed: bool = False) -> str:
    """A button of one message; `target` is SIDE.NODE."""
    pressed = " pressed" if is_pressed else ""
    return f'<button class="act{pressed}" name="{name}" value="{target}">{translate(language, name)}</button>'


def _versions(bubble: Bubble, side: int, language: str) -> str:
    number, count = bubble.version
    if count < 2 or bubble.node is None:
        return ""
    arrows = [
        f'<button class="act" name="{name}" value="{side}.{bubble.node.id}" title="{translate(language, name)}"'
        f' aria-label="{translate(language, name)}">{sign}</button>'
        for name, sign in (("previous_version", "‹"), ("next_version", "›"))
    ]
    return f'{arrows[0]}<span class="version">{number}/{count}</span>{arrows[1]}'
