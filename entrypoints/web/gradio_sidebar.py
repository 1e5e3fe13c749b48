"""The events of the Gradio page that concern the list of conversations, files and the settings of a visitor."""

import json
from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio.blocks import Block

from entrypoints.web import gradio_assets as assets
from entrypoints.web.browser_storage import export_conversation, restored_settings, stored_values
from entrypoints.web.client import ApiClient
from entrypoints.web.conversation import title_of
from entrypoints.web.documents import picked_document
from entrypoints.web.gradio_layout import Layout
from entrypoints.web.i18n import translate
from entrypoints.web.request_errors import ErrorMessage
from entrypoints.web.session import ChatOptions, ChatSession
from entrypoints.web.transcript import status_line

Updates = dict[Block, Any]  # component: its new value or gr.update(...)
Draw = Callable[[ChatSession, str], Updates]
# No event is part of a public API, and none waits for the event of another visitor.
EVENT_OPTIONS: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
# Gradio drops an event while an earlier one of the same kind ends, such as Enter just after an answer
REPEATABLE_OPTIONS = {**EVENT_OPTIONS, "trigger_mode": "multiple"}


def list_update(session: ChatSession, search: str) -> dict[str, Any]:
    """The choices of the list of conversations, with the one that is shown selected."""
    session.kept.synchronize()
    session.kept.put(session.conversation)
    entries = session.kept.entries(search)
    shown = session.conversation.id
    update: dict[str, Any] = gr.update(choices=entries, value=shown if shown in [id_ for _, id_ in entries] else None)
    return update


class SidebarEvents:
    """The side bar of one page. `draw(session, language)` shows the conversation in the components `shown`."""

    def __init__(self, ui: Layout, api: ApiClient, session: gr.State, draw: Draw, shown: list[Block]) -> None:
        self.ui, self.api, self.session, self.draw, self.shown = ui, api, session, draw, shown
        self.listed = [ui.conversations, ui.title, ui.confirm_row, ui.document_row, ui.document_name, ui.stored]

    def connect(self, changing_events: list[Any]) -> None:
        """Connect everything; after each of `changing_events` the list and the browser get the conversation."""
        ui = self.ui
        visitor = [self.session, ui.language]
        everything = [*self.shown, *self.listed]
        opened = [
            ui.conversations.input(self.open, [*visitor, ui.search, ui.conversations], everything, **EVENT_OPTIONS),
            ui.title.submit(self.rename, [*visitor, ui.search, ui.title], self.listed, **EVENT_OPTIONS),
            ui.confirm_delete.click(self.delete, [*visitor, ui.search], everything, **EVENT_OPTIONS),
            ui.import_file.click(
                self.import_file, [ui.received, *visitor, ui.search], everything, js=assets.PICK_JSON, **EVENT_OPTIONS
            ),
        ]
        listing = [
            event.then(self.refresh, [*visitor, ui.search], self.listed, **EVENT_OPTIONS) for event in changing_events
        ]
        for event in (*opened, *listing):
            event.then(None, ui.stored, None, js=assets.WRITE_BROWSER, api_visibility="private")
        ui.search.input(self.refresh, [*visitor, ui.search], self.listed, **EVENT_OPTIONS)
        ui.delete_conversation.click(lambda: gr.update(visible=True), None, ui.confirm_row, **EVENT_OPTIONS)
        ui.cancel_delete.click(lambda: gr.update(visible=False), None, ui.confirm_row, **EVENT_OPTIONS)
        for button in (ui.export, ui.export_markdown, ui.export_json, ui.export_all):
            kind = gr.State(button.elem_id)
            button.click(self.export, [*visitor, kind], [ui.download, ui.status], **EVENT_OPTIONS).then(
                None, ui.download, None, js=assets.DOWNLOAD, api_visibility="private"
            )
        self._connect_document()
        self._connect_settings()

    def _connect_document(self) -> None:
        ui = self.ui
        visitor = [self.session, ui.language]
        outputs = [*self.shown, *self.listed]
        ui.attach.click(
            self.attach, [ui.received, *visitor, ui.search, *ui.options], outputs, js=assets.PICK_TEXT, **EVENT_OPTIONS
        ).then(None, None, None, js=assets.FOCUS_QUESTION, api_visibility="private")
        ui.remove_document.click(self.remove_document, [*visitor, ui.search], outputs, **EVENT_OPTIONS)

    def _connect_settings(self) -> None:
        ui = self.ui
        prompts = [ui.prompts, ui.remove_prompt, ui.kept_prompts]
        ui.save_prompt.click(self.save_prompt, [ui.kept_prompts, ui.system], prompts, **EVENT_OPTIONS)
        ui.remove_prompt.click(self.remove_prompt, [ui.kept_prompts, ui.prompts], prompts, **EVENT_OPTIONS)
        ui.prompts.input(lambda text: text, ui.prompts, ui.system, **EVENT_OPTIONS)
        kept = [ui.language, ui.theme, *ui.options[:-2], ui.kept_prompts]
        inputs = [each.input for each in kept[:-1]]
        gr.on(
            [*inputs, ui.kept_prompts.change, ui.prompts.input], None, kept, None,
            js=assets.SAVE_SETTINGS, api_visibility="private",
        )  # fmt: skip

    def open(self, session: ChatSession, language: str, search: str, id_: str) -> Updates:
        """Show another conversation."""
        session.open(session.kept.get(id_))
        return {**self.draw(session, language), **self.refresh(session, language, search)}

    def rename(self, session: ChatSession, language: str, search: str, title: str) -> Updates:
        """Give the conversation another title."""
        if title.strip() and session.conversation.nodes:
            session.conversation.title = title.strip()
        return self.refresh(session, language, search)

    def delete(self, session: ChatSession, language: str, search: str) -> Updates:
        """Delete the conversation that is shown."""
        session.delete()
        return {**self.draw(session, language), **self.refresh(session, language, search)}

    def import_file(self, picked: str, session: ChatSession, language: str, search: str) -> Updates:
        """Add the conversations of a file and show the first one."""
        if picked:
            found = session.kept.add_from(json.loads(picked)["text"] or "")
            if isinstance(found, ErrorMessage):
                session.error = found
            elif found:
                session.open(found[0])
                session.kept.unwritten = [each.id for each in found]
        return {**self.draw(session, language), **self.refresh(session, language, search)}

    def refresh(self, session: ChatSession, language: str, search: str) -> Updates:
        """The list, the title, the document and what the browser has to write."""
        document = session.document
        return {
            self.ui.conversations: list_update(session, search),
            self.ui.title: session.conversation.title,
            self.ui.confirm_row: gr.update(visible=False),
            self.ui.document_row: gr.update(visible=document is not None),
            self.ui.document_name: document.describe(language) if document else "",
            self.ui.stored: session.changes(),
        }

    def export(self, session: ChatSession, language: str, kind: str) -> Updates:
        """The file, or a notice if there is nothing to export."""
        file = export_conversation(session, language, kind)
        notice = status_line(session, language) if file else translate(language, "nothing_to_export")
        return {self.ui.download: file, self.ui.status: notice}

    def attach(self, picked: str, session: ChatSession, language: str, search: str, *options: Any) -> Updates:
        """Add the picked document to the next question."""
        chosen = ChatOptions(*options)
        found = picked_document(picked, session.api_for(self.api, chosen.key), chosen.model or "")
        if isinstance(found, ErrorMessage):
            session.error = found
        elif found:
            session.document, session.error = found, None
        return {**self.draw(session, language), **self.refresh(session, language, search)}

    def remove_document(self, session: ChatSession, language: str, search: str) -> Updates:
        """The next question contains no document."""
        session.document = None
        return {**self.draw(session, language), **self.refresh(session, language, search)}

    def save_prompt(self, kept: str, system: str) -> Updates:
        """Keep the system prompt in the browser."""
        prompts = json.loads(kept)
        if system.strip() and system not in prompts:
            prompts.append(system)
        return self.prompt_updates(prompts, system)

    def remove_prompt(self, kept: str, chosen: str | None) -> Updates:
        """Forget the chosen system prompt."""
        return self.prompt_updates([prompt for prompt in json.loads(kept) if prompt != chosen], None)

    def prompt_updates(self, prompts: list[str], chosen: str | None) -> Updates:
        """The list of saved system prompts, hidden while it is empty."""
        choices = [(title_of(prompt), prompt) for prompt in prompts]
        value = chosen if chosen in prompts else None
        return {
            self.ui.prompts: gr.update(choices=choices, value=value, visible=bool(prompts)),
            self.ui.remove_prompt: gr.update(visible=bool(prompts)),
            self.ui.kept_prompts: json.dumps(prompts, ensure_ascii=False),
        }

    def restore(self, stored: str, session: ChatSession, language: str) -> Updates:
        """The language, the settings and the conversations of an earlier visit with this browser."""
        ui, found = self.ui, stored_values(stored)
        session.kept.restore(found.get("conversations") or "[]")
        current = session.kept.conversations.get(found.get("current") or "")
        if current and not session.conversation.nodes:
            session.conversation = current
        settings = restored_settings(found.get("settings"))
        language = settings.pop("language", language)
        prompts = settings.pop("prompts", [])
        widgets = {widget.elem_id: widget for widget in (*ui.options, ui.theme)}
        updates: Updates = {widgets[name]: value for name, value in settings.items()}
        if "model" in settings:  # until the models are loaded, it is the only choice
            updates[ui.model] = gr.update(choices=[settings["model"]], value=settings["model"])
        return {
            ui.language: language,
            **updates,
            **(self.prompt_updates(prompts, None) if prompts else {}),
            **self.draw(session, language),
            **self.refresh(session, language, ""),
        }

    def restored(self) -> list[Block]:
        """The components that `restore` updates."""
        ui = self.ui
        return [
            ui.language, ui.theme, *ui.options, ui.prompts, ui.remove_prompt, ui.kept_prompts, *self.shown, *self.listed
        ]  # fmt: skip
