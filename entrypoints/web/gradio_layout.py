"""Components of the Gradio page and where they are. Their events are in gradio_page.py."""

from typing import Any

import gradio as gr
from gradio.blocks import Block

from entrypoints.web.browser_storage import PLACE_TEXTS, THEME_TEXTS
from entrypoints.web.gradio_assets import ACTION_SCRIPT, LATEX_DELIMITERS
from entrypoints.web.i18n import LANGUAGES, TEXTS, translate
from entrypoints.web.session import ChatOptions, SliderRange, slider_ranges

EXAMPLES = ("example_1", "example_2", "example_3", "example_4")


class Layout:
    """All components; `labels` lists those whose texts follow the language, as (component, {property: key})."""

    def __init__(self, feedback: bool, place: str) -> None:
        self.i18n = gr.I18n(**{tag: _fixed_texts(language) for language in LANGUAGES for tag in _locales(language)})
        self.labels: list[tuple[Block, dict[str, str]]] = []
        self._create_sidebar(place)
        self._create_header()
        self._create_conversation(feedback)
        self._create_input()
        # invisible: what the scripts of the page send and receive
        self.action = gr.HTML("", js_on_load=ACTION_SCRIPT, visible="hidden", elem_id="action")
        self.kept_prompts = gr.Textbox("[]", visible=False)  # JSON
        self.received = gr.Textbox(visible=False)
        self.stored = gr.Textbox(visible=False)
        self.copied = gr.Textbox(visible=False)
        self.download = gr.JSON(visible=False)

    def _add(self, component_class: type[Block], texts: dict[str, str], **properties: Any) -> Any:
        """A component whose `texts` ({property: key}) follow the language."""
        translated: dict[str, Any] = {name: self.i18n(key) for name, key in texts.items()}
        component = component_class(**translated, **properties)
        self.labels.append((component, texts))
        return component

    def _button(self, name: str, **properties: Any) -> Any:
        return self._add(gr.Button, {"value": name}, size="sm", elem_id=name, **properties)

    def _create_sidebar(self, place: str) -> None:
        with gr.Sidebar(width=320, open=False, elem_id="settings") as self.sidebar:
            self.clear = self._button("clear", variant="primary")
            self.search = self._add(
                gr.Textbox, {"placeholder": "search", "label": "search"}, elem_id="search", show_label=False
            )
            self.conversations = self._add(gr.Radio, {"label": "conversations"}, choices=[], elem_id="conversations")
            self.manage = self._add(gr.Accordion, {"label": "manage"}, open=False, elem_id="manage")
            with self.manage:
                self._create_manage_section(place)
            self.settings = self._add(gr.Accordion, {"label": "settings"}, open=True, elem_id="options")
            with self.settings:
                self._create_settings()

    def _create_manage_section(self, place: str) -> None:
        self._add(gr.Markdown, {"value": PLACE_TEXTS[place]})
        self.title = self._add(gr.Textbox, {"label": "rename"}, elem_id="rename", submit_btn=False)
        with gr.Row():
            self.export_markdown = self._button("export_markdown", min_width=100)
            self.export_json = self._button("export_json", min_width=100)
        self.export = self._button("export")
        with gr.Row():
            self.export_all = self._button("export_all", min_width=100)
            self.import_file = self._button("import_file", min_width=100)
        self.delete_conversation = self._button("delete_conversation", variant="stop")
        with gr.Row(visible=False) as self.confirm_row:
            self.confirm_delete = self._button("confirm_delete_conversation", variant="stop", min_width=100)
            self.cancel_delete = self._button("cancel", min_width=100)

    def _create_settings(self) -> None:
        self.model = self._add(gr.Dropdown, {"label": "model"}, choices=[], elem_id="model")
        self.compare_model = self._add(
            gr.Dropdown, {"label": "compare_model"}, choices=[("", "")], value="", elem_id="compare_model"
        )
        self.refresh = self._button("refresh")
        self.prompts = self._add(gr.Dropdown, {"label": "saved_prompts"}, choices=[], elem_id="prompts", visible=False)
        self.system = self._add(
            gr.Textbox, {"label": "system", "placeholder": "system_hint"}, lines=2, elem_id="system"
        )
        with gr.Row():
            self.save_prompt = self._button("save_prompt", min_width=100)
            self.remove_prompt = self._button("remove_prompt", min_width=100, visible=False)
        self.sliders = [
            self._add(gr.Slider, {"label": name}, elem_id=name, **_slider_properties(bounds))
            for name, bounds in slider_ranges().items()
        ]
        self.tool_mode = self._add(gr.Checkbox, {"label": "tool_mode"}, elem_id="tool_mode")
        self.tools = self._add(
            gr.Code, {"label": "tools"}, value=ChatOptions.tools, language="json", visible=False, elem_id="tools"
        )
        self.key = self._add(gr.Textbox, {"label": "key"}, type="password", elem_id="key")
        self.theme = self._add(
            gr.Radio, {"label": "theme"}, choices=theme_choices("en"), value="system", elem_id="theme"
        )
        self.options = [
            self.model, self.system, *self.sliders, self.tool_mode, self.tools, self.compare_model, self.key
        ]  # fmt: skip

    def _create_header(self) -> None:
        with gr.Row(elem_id="top", equal_height=True):
            gr.Markdown(f"# {translate('en', 'title')}", min_width=96)
            self.user = gr.HTML(visible=False, elem_id="user", min_width=120)
            self.language = gr.Radio(
                [(name, language) for language, name in LANGUAGES.items()], value="zh", label="语言 Language",
                show_label=False, container=False, elem_id="language", min_width=148, scale=0,
            )  # fmt: skip

    def _create_conversation(self, feedback: bool) -> None:
        common: dict[str, Any] = {
            "show_label": False, "buttons": [], "latex_delimiters": LATEX_DELIMITERS, "sanitize_html": True,
            "allow_tags": False, "feedback_options": None, "layout": "bubble", "allow_file_downloads": False,
            "height": None, "scale": 1,
        }  # fmt: skip
        with gr.Row(elem_id="chats", equal_height=True):
            self.chat = self._add(
                gr.Chatbot, {"placeholder": "empty"}, elem_id="chat", examples=examples("en"), **common
            )
            self.other_chat = gr.Chatbot(elem_id="other_chat", visible=False, **common)
        self.banner = gr.HTML(visible=False, elem_id="banner")
        self.status = gr.Markdown(elem_id="status", sanitize_html=True)
        if feedback:
            self._add(gr.Markdown, {"value": "feedback_notice"}, elem_id="feedback_notice")

    def _create_input(self) -> None:
        with gr.Group(visible=False, elem_id="edit_group") as self.edit_group:
            self.edit_text = self._add(gr.Textbox, {"label": "edit_label"}, lines=2, max_lines=12, elem_id="edit_text")
            with gr.Row():
                self.save_edit = self._button("save", variant="primary", min_width=90)
                self.cancel_edit = self._button("cancel_edit", min_width=90)
        with gr.Row(visible=False, elem_id="document", equal_height=True) as self.document_row:
            self.document_name = gr.Markdown(sanitize_html=True, elem_id="document_name")
            self.remove_document = self._button("remove_document", scale=0, min_width=90)
        with gr.Row(elem_id="input", equal_height=True):
            self.attach = self._button("attach", scale=0, min_width=84)
            self.question = self._add(
                gr.Textbox, {"placeholder": "question", "submit_btn": "send", "label": "question_label"},
                show_label=False, lines=1, max_lines=8, autofocus=True, elem_id="question", container=False,
            )  # fmt: skip


def examples(language: str) -> list[dict[str, str]]:
    """Questions of the empty page."""
    return [{"text": translate(language, key)} for key in EXAMPLES]


def theme_choices(language: str) -> list[tuple[str, str]]:
    """(text, value) of each theme."""
    return [(translate(language, THEME_TEXTS[theme]), theme) for theme in THEME_TEXTS]


def _locales(language: str) -> list[str]:
    return ["zh", "zh-CN", "zh-TW", "zh-HK"] if language == "zh" else [language]


def _fixed_texts(language: str) -> dict[str, str]:
    """The texts without placeholders, which Gradio translates in the browser."""
    return {key: text for key in TEXTS if "{" not in (text := TEXTS[key][list(LANGUAGES).index(language)])}


def _slider_properties(bounds: SliderRange) -> dict[str, float]:
    return {"minimum": bounds.minimum, "maximum": bounds.maximum, "step": bounds.step, "value": bounds.default}
