"""The chat page in Gradio. A ChatSession per visitor holds the raw messages; the chat widget only displays them."""

import asyncio
import html
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
from starlette.applications import Starlette

from entrypoints.web import gradio_assets as assets
from entrypoints.web.client import ApiClient
from entrypoints.web.feedback import FeedbackFile
from entrypoints.web.gradio_html import chat_messages
from entrypoints.web.gradio_layout import Layout, examples, theme_choices
from entrypoints.web.gradio_sidebar import EVENT_OPTIONS, REPEATABLE_OPTIONS, SidebarEvents, Updates
from entrypoints.web.gradio_visitors import VisitorBlocks, VisitorSession, user_link
from entrypoints.web.i18n import negotiate_language, translate
from entrypoints.web.message_actions import Action, MessageActions
from entrypoints.web.request_errors import ErrorMessage
from entrypoints.web.session import ChatOptions, ChatSession, slider_ranges
from entrypoints.web.transcript import error_text, input_hint, model_label, progress, status_line
from entrypoints.web.visitors import Visitors

UPDATE_INTERVAL_SECONDS = 0.08
RETRY_INTERVAL_SECONDS = 4


def create_app(
    api: ApiClient, root_path: str = "", feedback: FeedbackFile | None = None, visitors: Visitors | None = None
) -> Starlette:
    """The page as an ASGI application, below `root_path` if there is one."""
    page = ChatPage(api, feedback, visitors or Visitors())
    app: Starlette = gr.mount_gradio_app(
        Starlette(),
        page.blocks,
        path=root_path or "/",
        theme=gr.themes.Soft(font=assets.TEXT_FONTS, font_mono=assets.MONO_FONTS).set(**assets.CONTRAST),
        css=assets.CSS,
        head=assets.HEAD,
        i18n=page.ui.i18n,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        max_file_size=1,
        show_error=False,
    )
    return app


class ChatPage:
    """The event handlers; the state of a visitor is in `self.session` only."""

    def __init__(self, api: ApiClient, feedback: FeedbackFile | None, visitors: Visitors) -> None:
        self.api = api
        self.visitors = visitors
        self.actions = MessageActions(api, feedback)
        with VisitorBlocks(title="ChatGLM3", fill_height=True, analytics_enabled=False) as self.blocks:
            self.session = gr.State(VisitorSession(), delete_callback=ChatSession.stop_answers)
            self.retry = gr.Timer(RETRY_INTERVAL_SECONDS, active=False)
            self.ui = Layout(bool(feedback), visitors.place)
            self._connect_chat_events()
            self._connect_settings_events()

    def _connect_chat_events(self) -> None:
        ui = self.ui
        visitor = [self.session, ui.language]
        inputs = [*visitor, ui.question, *ui.options]
        outputs = [
            ui.chat, ui.other_chat, ui.status, ui.banner, self.retry, ui.question, ui.edit_group, ui.edit_text,
            ui.copied,
        ]  # fmt: skip
        self.shown = outputs
        submitted = ui.question.submit(self.submit, inputs, outputs, **REPEATABLE_OPTIONS)
        ui.question.stop(ChatSession.stop_answers, self.session, None, queue=False, **EVENT_OPTIONS).then(
            None, None, None, js=assets.FOCUS_QUESTION, api_visibility="private"
        )
        ui.action.tick(lambda: None, **REPEATABLE_OPTIONS)  # see page.wake in gradio_assets.py
        clicked = ui.action.click(self.act, inputs, outputs, **REPEATABLE_OPTIONS)
        clicked.then(None, ui.copied, None, js=assets.COPY, api_visibility="private")
        # an event of its own: when a generator has ended, Gradio sends its last values again, over what was typed since
        opened = clicked.then(self.open_edit_field, self.session, [ui.edit_group, ui.edit_text], **REPEATABLE_OPTIONS)
        saved = ui.save_edit.click(self.save_edit, [*visitor, ui.edit_text, *ui.options], outputs, **REPEATABLE_OPTIONS)
        cancelled = ui.cancel_edit.click(self.cancel_edit, visitor, outputs, **EVENT_OPTIONS)
        example = ui.chat.example_select(self.submit_example, [*visitor, *ui.options], outputs, **REPEATABLE_OPTIONS)
        cleared = ui.clear.click(self.clear, visitor, outputs, **EVENT_OPTIONS)
        for event in (opened, saved, cancelled):
            event.then(None, None, None, js=assets.FOCUS_AFTER_ACTION, api_visibility="private")
        for event in (example, cleared):
            event.then(None, None, None, js=assets.FOCUS_QUESTION, api_visibility="private")
        self.side = SidebarEvents(ui, self.api, self.session, self.draw, outputs)
        self.side.connect([submitted, clicked, saved, example, cleared])

    def _connect_settings_events(self) -> None:
        ui = self.ui
        labelled = [component for component, _ in ui.labels]
        translated = [*labelled, ui.chat, ui.other_chat, ui.status, ui.banner, self.retry, ui.question, ui.theme]
        translated = list(dict.fromkeys(translated))
        ui.language.input(self.change_language, [self.session, ui.language], translated, **EVENT_OPTIONS).then(
            None, ui.language, None, js=assets.APPLY_LANGUAGE, api_visibility="private"
        )
        ui.tool_mode.change(lambda on: gr.update(visible=on), ui.tool_mode, ui.tools, **EVENT_OPTIONS)
        load_models: dict[str, Any] = {
            "fn": self.load_models,
            "inputs": [self.session, ui.language, ui.model, ui.key, ui.sliders[0]],
            "outputs": [ui.model, ui.compare_model, ui.sliders[0], ui.banner, self.retry],
            **EVENT_OPTIONS,
        }
        started = self.blocks.load(
            self.restore,
            [ui.received, self.session],
            [ui.user, *self.side.restored()],
            js=assets.READ_BROWSER,
            **EVENT_OPTIONS,
        )
        started.then(None, ui.language, None, js=assets.APPLY_LANGUAGE, api_visibility="private")
        started.then(self.translate_labels, ui.language, list(dict.fromkeys([*labelled, ui.theme])), **EVENT_OPTIONS)
        started.then(**load_models)
        gr.on([ui.refresh.click, ui.key.change, self.retry.tick, ui.model.input], **load_models)
        ui.theme.change(None, ui.theme, None, js=assets.APPLY_THEME, api_visibility="private")
        self.blocks.load(None, None, ui.sidebar, js=assets.OPEN_SIDEBAR_ON_WIDE_SCREENS, api_visibility="private")

    def restore(self, stored: str, session: ChatSession, request: gr.Request) -> Updates:
        """What the browser kept, in the language of the browser if it kept none; and the name of the signed-in user."""
        user = self.visitors.welcome(session, request.headers)
        language = negotiate_language(request.headers.get("accept-language"))
        updates = self.side.restore(stored, session, language)
        return {**updates, self.ui.user: user_link(user, updates[self.ui.language])}

    async def submit(self, session: ChatSession, language: str, text: str, *options: Any) -> AsyncIterator[Updates]:
        """Answer the input, a question or the result of a tool call; nothing happens while an answer is in progress."""
        if not text.strip() or session.running:
            yield {}  # Gradio empties every output of a handler that yields nothing
            return
        chosen = ChatOptions(*options)
        is_sent = session.ask(self.api, chosen, text)
        async for updates in self._show_answers(session, language, chosen):
            if is_sent:
                updates[self.ui.question] = {**updates[self.ui.question], "value": ""}
                is_sent = False
            yield updates

    async def submit_example(
        self, event: gr.SelectData, session: ChatSession, language: str, *options: Any
    ) -> AsyncIterator[Updates]:
        """Answer a question of the empty page."""
        async for updates in self.submit(session, language, event.value["text"], *options):
            updates.get(self.ui.question, {}).pop("value", None)  # keeps a draft
            yield updates

    async def act(
        self, event: gr.EventData, session: ChatSession, language: str, _text: str, *options: Any
    ) -> AsyncIterator[Updates]:
        """What a button of a message does."""
        chosen = ChatOptions(*options)
        side, _, node = event.value.partition(".")
        result = self.actions.run(session, chosen, Action(event.name, int(side), int(node)), language)
        async for updates in self._show_answers(session, language, chosen, {self.ui.copied: result.copied}):
            yield updates

    async def save_edit(self, session: ChatSession, language: str, text: str, *options: Any) -> AsyncIterator[Updates]:
        """Use the edited text: a new version of a question, or the correction of an answer."""
        chosen = ChatOptions(*options)
        self.actions.save_edit(session, chosen, text)
        async for updates in self._show_answers(session, language, chosen, self._edit_field(session)):
            yield updates

    def open_edit_field(self, session: ChatSession) -> Updates:
        """Show the text to edit, once: the same event of an earlier click would replace what was typed meanwhile."""
        is_open = session.edited is not None and session.edited == session.opened_edit
        return {} if is_open else self._edit_field(session)

    def cancel_edit(self, session: ChatSession, language: str) -> Updates:
        """Close the field of the edited text."""
        session.edited = None
        return {**self._edit_field(session), **self._conversation(session, language)}

    async def _show_answers(
        self, session: ChatSession, language: str, options: ChatOptions, extra: Updates | None = None
    ) -> AsyncIterator[Updates]:
        """Everything at the start, with `extra`, and at the end of the answers; between them the conversation only."""
        extra = extra or {}
        while running := dict(session.running):
            yield {**extra, **self._conversation(session, language), **self._banner(session, language)}
            extra = {}
            try:
                shown: tuple[object, ...] = ()
                while session.running == running and not session.is_done():
                    await asyncio.sleep(UPDATE_INTERVAL_SECONDS)
                    state = tuple(progress(each) for each in running.values())
                    if state != shown:
                        shown = state
                        yield self._chats(session, language)
            finally:  # also if the visitor has left
                if session.running == running:
                    session.finish_answers()
            if session.error or not session.run_demo_tools(self.api, options):
                break
        yield {**extra, **self._conversation(session, language), **self._banner(session, language)}

    def _conversation(self, session: ChatSession, language: str) -> Updates:
        """The chat, its status line and the buttons of the input field, whose text is left alone."""
        is_running = bool(session.running)
        return {
            **self._chats(session, language),
            self.ui.status: "" if is_running else status_line(session, language),
            self.ui.question: gr.update(
                placeholder=input_hint(session, language),
                submit_btn=False if is_running else translate(language, "send"),
                stop_btn=translate(language, "stop") if is_running else False,
            ),
        }

    def _chats(self, session: ChatSession, language: str) -> Updates:
        """The messages of one or two sides."""
        feedback = bool(self.actions.feedback)
        two = len(session.conversation.leaves) > 1
        other = chat_messages(session, language, 1, feedback) if two else []
        return {
            self.ui.chat: chat_messages(session, language, 0, feedback),
            self.ui.other_chat: gr.update(value=other, visible=two),
        }

    def _edit_field(self, session: ChatSession) -> Updates:
        """Open the field with the text to edit; close it if nothing is edited."""
        session.opened_edit = session.edited
        node = session.conversation.nodes.get(session.edited or 0)
        text = self.actions.editable_text(node) if node else ""
        return {self.ui.edit_group: gr.update(visible=node is not None), self.ui.edit_text: text}

    def _banner(self, session: ChatSession, language: str) -> Updates:
        """The banner, and the timer that retries until a server is available again."""
        error = session.error
        text = html.escape(error_text(error, language)) if error else ""
        return {
            self.ui.banner: gr.update(value=f'<div role="alert">{text}</div>', visible=bool(text)),
            self.retry: gr.Timer(active=bool(error and error.key in ("unreachable", "loading"))),
        }

    def clear(self, session: ChatSession, language: str) -> Updates:
        """Start a new conversation."""
        session.open()
        return self.draw(session, language)

    def draw(self, session: ChatSession, language: str) -> Updates:
        """Everything that shows the conversation."""
        return {
            **self._conversation(session, language),
            **self._banner(session, language),
            **self._edit_field(session),
        }

    def change_language(self, session: ChatSession, language: str) -> Updates:
        """All texts in another language."""
        labels = self.translate_labels(language)
        shown = {**self._conversation(session, language), **self._banner(session, language)}
        labels[self.ui.chat]["value"] = shown.pop(self.ui.chat)
        return {**labels, **shown, self.ui.question: {**labels[self.ui.question], **shown[self.ui.question]}}

    def translate_labels(self, language: str) -> Updates:
        """The texts that belong to no conversation: at the start a visitor may open one before this has arrived."""
        labels: Updates = {}
        for component, texts in self.ui.labels:
            properties: dict[str, Any] = {name: translate(language, key) for name, key in texts.items()}
            labels[component] = gr.update(**properties)
        labels[self.ui.chat] = gr.update(placeholder=translate(language, "empty"), examples=examples(language))
        labels[self.ui.question] = gr.update(label=translate(language, "question_label"))
        labels[self.ui.theme] = gr.update(label=translate(language, "theme"), choices=theme_choices(language))
        return labels

    def load_models(
        self, session: ChatSession, language: str, selected: str | None, key: str, max_tokens: int
    ) -> Updates:
        """The models of the server; keeps the selected one if it is still available."""
        models = session.api_for(self.api, key).list_models()
        if isinstance(models, ErrorMessage):
            session.error = models
            return self._banner(session, language)
        if session.error and session.error.key in ("unreachable", "loading", "needs_key", "wrong_key", "busy"):
            session.error = None
        model = next((model for model in models if model.name == selected), models[0] if models else None)
        limit = slider_ranges(model.context_length if model else None)["max_tokens"].maximum
        choices = [(model_label(model, language), model.name) for model in models]
        others = [(translate(language, "no_comparison"), ""), *choices]
        return {
            self.ui.model: gr.update(choices=choices, value=model.name if model else None),
            self.ui.compare_model: gr.update(choices=others),
            self.ui.sliders[0]: gr.update(maximum=limit, value=min(max_tokens, limit)),
            **self._banner(session, language),
        }
