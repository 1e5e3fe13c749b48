"""The chat page in Gradio. What was said is kept raw in a Talk of each visitor; the chat widget only shows it."""

import asyncio
import html
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
from starlette.applications import Starlette

from entrypoints.web.client import Api, Problem
from entrypoints.web.display import bubbles, for_gradio, status
from entrypoints.web.gradio_assets import CSS, DELIMITERS, DOWNLOAD, FONTS, HEAD, MONO_FONTS, OPEN_WHERE_WIDE
from entrypoints.web.talk import Options, Slider, Talk, sliders
from entrypoints.web.texts import LANGUAGES, TEXTS, language_of, say

TICK_SECONDS = 0.08
RETRY_SECONDS = 4


def create_app(api: Api, root_path: str = "") -> Starlette:
    """The page as an ASGI application, under `root_path` if there is one."""
    page = ChatPage(api)
    return gr.mount_gradio_app(
        Starlette(),
        page.blocks,
        path=root_path or "/",
        theme=gr.themes.Soft(font=FONTS, font_mono=MONO_FONTS),
        css=CSS,
        head=HEAD,
        i18n=page.i18n,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        max_file_size=1,
        show_error=False,
    )


class ChatPage:
    """The widgets and what they do; holds nothing of any visitor."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.i18n = gr.I18n(**{tag: _texts(language) for language in LANGUAGES for tag in _tags(language)})
        self.labels: list[tuple[Any, dict[str, str]]] = []  # widget, {property: key of its text}
        with gr.Blocks(title="ChatGLM3", fill_height=True, analytics_enabled=False) as self.blocks:
            self.talk = gr.State(Talk(), delete_callback=Talk.stop)
            self.retry = gr.Timer(RETRY_SECONDS, active=False)
            self.settings()
            self.conversation()
            self.wire()

    def add(self, kind: type, texts: dict[str, str], **properties: Any) -> Any:
        """A widget whose `texts` ({property: key}) follow the language."""
        widget = kind(**{name: self.i18n(key) for name, key in texts.items()}, **properties)
        self.labels.append((widget, texts))
        return widget

    def settings(self) -> None:
        """The side bar."""
        with gr.Sidebar(width=320, open=False, elem_id="settings") as self.sidebar:
            self.model = self.add(gr.Dropdown, {"label": "model"}, choices=[], elem_id="model")
            self.refresh = self.add(gr.Button, {"value": "refresh"}, size="sm")
            self.system = self.add(
                gr.Textbox, {"label": "system", "placeholder": "system_hint"}, lines=2, elem_id="system"
            )
            self.sliders = [
                self.add(gr.Slider, {"label": name}, elem_id=name, **_slider(slider))
                for name, slider in sliders().items()
            ]
            self.tool_mode = self.add(gr.Checkbox, {"label": "tool_mode"}, elem_id="tool_mode")
            self.tools = self.add(
                gr.Code, {"label": "tools"}, value=Options.tools, language="json", visible=False, elem_id="tools"
            )
            self.key = self.add(gr.Textbox, {"label": "key"}, type="password", elem_id="key")
        self.chosen = [self.model, self.system, *self.sliders, self.tool_mode, self.tools, self.key]

    def conversation(self) -> None:
        """Title, language, banner, chat, question, buttons."""
        with gr.Row(elem_id="top", equal_height=True):
            gr.Markdown(f"## {say('en', 'title')}", min_width=96)
            self.language = gr.Radio(
                [(name, language) for language, name in LANGUAGES.items()], show_label=False, container=False,
                elem_id="language", min_width=148, scale=0,
            )  # fmt: skip
        self.banner = gr.HTML(visible=False, elem_id="banner")
        self.chat = self.add(
            gr.Chatbot, {"placeholder": "empty"}, show_label=False, elem_id="chat", height="var(--chat-height)",
            buttons=["copy", "copy_all"], latex_delimiters=DELIMITERS, sanitize_html=True, allow_tags=False,
            feedback_options=None, layout="bubble", allow_file_downloads=False,
        )  # fmt: skip
        self.status = gr.Markdown(elem_id="status", sanitize_html=True)
        self.question = self.add(
            gr.Textbox, {"placeholder": "question", "submit_btn": "send"}, show_label=False, lines=1, max_lines=8,
            autofocus=True, elem_id="question",
        )  # fmt: skip
        with gr.Row(elem_id="actions"):
            self.regenerate, self.edit, self.clear, self.export = self.actions = [
                self.add(gr.Button, {"value": name}, size="sm", elem_id=name)
                for name in ("regenerate", "edit", "clear", "export")
            ]
        self.exported = gr.Textbox(visible=False)

    def wire(self) -> None:
        """Events. None is offered as an API; none waits for another visitor's."""
        visitor = [self.talk, self.language]
        growing = [self.chat, self.status, self.banner, self.retry, self.question, *self.actions]
        alone = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
        asking = [*visitor, self.question, *self.chosen]
        self.question.submit(self.ask, asking, growing, **alone)
        self.regenerate.click(self.again, asking, growing, **alone)
        self.question.stop(Talk.stop, self.talk, None, queue=False, **alone)
        shown = [self.chat, self.status, self.question]
        self.edit.click(self.take_back, visitor, shown, **alone)
        gr.on([self.clear.click, self.chat.clear], self.start_anew, visitor, shown, **alone)
        self.export.click(self.rows, visitor, [self.exported, self.status], **alone).then(
            None, self.exported, None, js=DOWNLOAD, api_visibility="private"
        )
        labelled = [widget for widget, _ in self.labels]
        self.language.input(self.speak, visitor, [*labelled, self.status], **alone)
        self.tool_mode.input(lambda on: gr.update(visible=on), self.tool_mode, self.tools, **alone)
        models = {
            "fn": self.models, "inputs": [self.language, self.model, self.key, self.sliders[0]],
            "outputs": [self.model, self.sliders[0], self.banner, self.retry], **alone,
        }  # fmt: skip
        self.blocks.load(_language, None, self.language, **alone).then(**models)
        gr.on([self.refresh.click, self.key.change, self.retry.tick], **models)
        self.model.input(**models)
        self.blocks.load(None, None, self.sidebar, js=OPEN_WHERE_WIDE, api_visibility="private")

    async def ask(self, talk: Talk, language: str, text: str, *chosen: Any) -> AsyncIterator[dict]:
        """Answer what was typed, a question or a tool's result."""
        if text.strip():
            talk.take()
            talk.say(text)
            async for update in self.growing(talk, language, Options(*chosen)):
                yield {self.question: "", **update}

    async def again(self, talk: Talk, language: str, text: str, *chosen: Any) -> AsyncIterator[dict]:
        """Answer the last question anew, or for the first time where that failed."""
        talk.take()
        if talk.forget_answer():
            async for update in self.growing(talk, language, Options(*chosen)):
                yield update

    async def growing(self, talk: Talk, language: str, options: Options) -> AsyncIterator[dict]:
        """The answer as it grows: all that changes at its start and end, between them the text alone."""
        problem = talk.start(self.api, options)
        if answering := talk.answering:
            yield {
                **self.shown(talk, language),
                **self.banner_for(None, language),
                **{button: gr.update(interactive=False) for button in self.actions},
                self.question: gr.update(value="", interactive=False, submit_btn=False, stop_btn=say(language, "stop")),
            }
            try:
                pieces = 0
                while not answering.done.is_set():
                    await asyncio.sleep(TICK_SECONDS)
                    if answering.growth.pieces != pieces:
                        pieces = answering.growth.pieces
                        yield {self.chat: self.messages(talk, language)}
            finally:  # also when the visitor has gone
                if talk.answering is answering and (taken := talk.take()):
                    problem = taken.problem
        yield {
            **self.shown(talk, language),
            **self.banner_for(problem, language),
            **{button: gr.update(interactive=True) for button in self.actions},
        }

    def shown(self, talk: Talk, language: str) -> dict:
        """The chat, its status line and the field below it."""
        waiting = talk.waiting_calls()
        hint = (
            say(language, "observation", name=waiting[0]["function"]["name"]) if waiting else say(language, "question")
        )
        return {
            self.chat: self.messages(talk, language),
            self.status: status(talk, language),
            self.question: gr.update(
                interactive=True, placeholder=hint, submit_btn=say(language, "send"), stop_btn=False
            ),
        }

    def messages(self, talk: Talk, language: str) -> list[dict]:
        """The talk as the chat widget takes it."""
        return [
            {
                "role": bubble.role,
                "content": bubble.markdown,
                "metadata": {"title": bubble.title} if bubble.title else {},
            }
            for bubble in bubbles(talk, language, for_gradio)
        ]

    def banner_for(self, problem: Problem | None, language: str) -> dict:
        """The banner, and the timer that waits for a server to come back."""
        text = html.escape(say(language, problem.key, **problem.values)) if problem else ""
        return {
            self.banner: gr.update(value=f'<div role="alert">{text}</div>', visible=bool(text)),
            self.retry: gr.Timer(active=bool(problem and problem.key in ("down", "loading"))),
        }

    def take_back(self, talk: Talk, language: str) -> dict:
        """The last question goes back into the field."""
        talk.take()
        text = talk.forget_question()
        shown = self.shown(talk, language)
        return {**shown, self.question: gr.update(**_properties(shown[self.question]), value=text or "")}

    def start_anew(self, talk: Talk, language: str) -> dict:
        """An empty talk."""
        talk.clear()
        return self.shown(talk, language)

    def rows(self, talk: Talk, language: str) -> dict:
        """The rows for training, and what to say if there are none."""
        rows = talk.training_rows()
        return {
            self.exported: rows,
            self.status: status(talk, language) if rows else say(language, "nothing_to_export"),
        }

    def speak(self, talk: Talk, language: str) -> dict:
        """All texts in another language."""
        labels = {
            widget: gr.update(**{name: say(language, key) for name, key in texts.items()})
            for widget, texts in self.labels
        }
        return {**labels, **self.shown(talk, language)}

    def models(self, language: str, chosen: str | None, key: str, max_tokens: int) -> dict:
        """What the server offers; keeps the choice if it is still there."""
        found = self.api.with_key(key).models()
        if isinstance(found, Problem):
            return self.banner_for(found, language)
        names = [
            (
                say(language, "adapter_of", name=model.name, parent=model.parent) if model.parent else model.name,
                model.name,
            )
            for model in found
        ]
        model = next((model for model in found if model.name == chosen), found[0] if found else None)
        longest = sliders(model.window if model else None)["max_tokens"]
        return {
            self.model: gr.update(choices=names, value=model.name if model else None),
            self.sliders[0]: gr.update(maximum=longest.highest, value=min(max_tokens, longest.highest)),
            **self.banner_for(None, language),
        }


def _language(request: gr.Request) -> str:
    return language_of(request.headers.get("accept-language"))


def _tags(language: str) -> list[str]:
    return ["zh", "zh-CN", "zh-TW", "zh-HK"] if language == "zh" else [language]


def _texts(language: str) -> dict[str, str]:
    return {key: text for key in TEXTS if "{" not in (text := TEXTS[key][list(LANGUAGES).index(language)])}


def _slider(slider: Slider) -> dict[str, float]:
    return {"minimum": slider.lowest, "maximum": slider.highest, "step": slider.step, "value": slider.default}


def _properties(update: dict) -> dict:
    return {name: value for name, value in update.items() if name != "__type__"}
