"""One interface to both chat pages, so that a test runs on either of them."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from browsing import TIMEOUT_SECONDS
from playwright.sync_api import Locator, Page, expect
from scripted_engine import wait_until


class ChatDriver(ABC):
    """Actions and elements that the pages have in common; a question is a script of the engine (see scripted_engine).

    A page updates some time after an action, so every text is waited for.
    """

    input_selector: str
    attaches_on_submit = False  # a document is checked when the question is sent
    text_selector: str | None = None  # the text of a bubble without buttons and avatar; None: the whole bubble

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.address = address

    def open(self) -> "ChatDriver":
        self.page.goto(self.address)
        expect(self.input()).to_be_enabled()
        self.wait_until_idle()
        return self

    @abstractmethod
    def wait_until_idle(self) -> None:
        """Wait until the page has finished what it does without a click."""

    def input(self) -> Locator:
        return self.page.locator(self.input_selector)

    def submit(self, text: str) -> None:
        """Type into the input field and press Enter."""
        expect(self.input()).to_be_enabled()
        self.input().fill(text)
        self.input().press("Enter")

    def send(self, text: str) -> None:
        """Submit, and wait until the question is displayed; the answer may not have started."""
        count = self.bubbles("user").count()
        self.submit(text)
        expect(self.bubbles("user")).to_have_count(count + 1)

    def ask(self, text: str, answer: str | re.Pattern[str] | None = None) -> None:
        """Send, and wait for the complete answer, by default the text after `say`."""
        expected = text.removeprefix("say ") if answer is None else answer
        count = self.bubbles("assistant").count()
        self.send(text)
        expect(self.bubbles("assistant")).to_have_count(count + 1)
        if isinstance(expected, str):
            self.wait_for(lambda: self.answer() == expected)
        else:
            self.wait_for(lambda: expected.search(self.answer()))
        self.wait_for_answer()

    def send_to_both(self, text: str) -> None:
        """Submit to two models side by side, each of which displays the question."""
        self.submit(text)
        expect(self.bubbles("user")).to_have_count(2)
        self.wait_for_answer()

    def wait_for_answer(self) -> None:
        """Wait until no answer is in progress."""
        expect(self.stop_button()).to_have_count(0)
        expect(self.action("delete").last).to_be_visible()

    def click(self, name: str) -> None:
        self.button(name).click()

    def act(self, name: str, number: int = -1) -> None:
        """Click an action of a message: of the last one that has it, or of the one with this number among those."""
        self.action(name).nth(number).click()

    def clear(self) -> None:
        """Start a new conversation with an empty draft."""
        self.close_edit_form()
        if self.bubbles("user", "assistant").count():
            self.open_sidebar()
            self.click("clear")
            expect(self.bubbles("user", "assistant")).to_have_count(0)
        self.input().fill("")

    def close_edit_form(self) -> None:
        """Cancel editing, if a test left it open."""
        if self.button("cancel_edit").is_visible():
            self.click("cancel_edit")
            expect(self.button("cancel_edit")).to_have_count(0)

    def edit(self, text: str, number: int = -1, action: str = "edit") -> None:
        """Change the text of a message and save it."""
        self.act(action, number)
        self.edit_field().fill(text)
        self.click("save")

    def answer(self) -> str:
        """The current text of the last answer."""
        return ["", *self.texts("assistant")][-1]

    def texts(self, *roles: str) -> list[str]:
        """The current texts of these roles, in the order of the page."""
        script = "(bubbles, selector) => bubbles.map(b => (selector ? b.querySelector(selector) : b)?.innerText ?? '')"
        found = self.bubbles(*(roles or ("user", "assistant"))).evaluate_all(script, self.text_selector)
        return [text.replace("\u2060", "").strip() for text in found]

    def expect_texts(self, *texts: str) -> None:
        """Wait until the conversation consists of these texts."""
        self.wait_for(lambda: self.texts() == [*texts])

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until the condition holds; raises AssertionError with the displayed texts."""
        try:
            wait_until(condition, TIMEOUT_SECONDS)
        except AssertionError as error:
            raise AssertionError(f"the page shows {self.texts()}") from error

    def fill_setting(self, name: str, text: str) -> None:
        field = self.setting(name)
        field.fill(text)
        field.blur()

    def models(self) -> list[str]:
        """The entries of the model list, which is closed again."""
        self.setting("model").click()
        options = self.page.locator("[role=option]")
        expect(options.first).to_be_visible()
        names = [text.removeprefix("✓").strip() for text in options.all_inner_texts()]
        self.page.keyboard.press("Escape")
        return names

    def choose_model(self, name: str) -> None:
        self.setting("model").click()
        self.page.locator("[role=option]", has_text=name).click()

    def setting(self, name: str) -> Locator:
        """A field of the sidebar, which is opened if necessary."""
        self.open_sidebar()
        return self.field(name)

    def open_sidebar(self) -> None:
        if self.sidebar(is_open=False).count():
            self.toggle_sidebar()
            expect(self.sidebar(is_open=True)).to_have_count(1)

    def close_sidebar(self) -> None:
        self.toggle_sidebar()
        expect(self.sidebar(is_open=False)).to_have_count(1)

    @abstractmethod
    def bubbles(self, *roles: str) -> Locator:
        """The message bubbles of these roles, in the order of the page."""

    @abstractmethod
    def sidebar(self, is_open: bool) -> Locator:
        """The sidebar if it is open or closed."""

    @abstractmethod
    def toggle_sidebar(self) -> None: ...

    @abstractmethod
    def field(self, name: str) -> Locator:
        """The input of a setting."""

    @abstractmethod
    def button(self, name: str) -> Locator: ...

    @abstractmethod
    def action(self, name: str) -> Locator:
        """The buttons of this action of all messages, in the order of the page."""

    @abstractmethod
    def edit_field(self) -> Locator:
        """The field with the text of the message that is edited."""

    @abstractmethod
    def open_manage(self) -> None:
        """Show the buttons that export, import and delete conversations."""

    @abstractmethod
    def listed(self) -> list[str]:
        """The titles of the list of conversations."""

    @abstractmethod
    def choose_conversation(self, title: str, number: int = 0) -> None:
        """Open the conversation with this title; of several the one with this number, the newest being 0."""

    @abstractmethod
    def import_file(self, file: Path) -> None: ...

    @abstractmethod
    def attach(self, file: Path) -> None:
        """Add a document to the next question."""

    @abstractmethod
    def stop_button(self) -> Locator: ...

    @abstractmethod
    def status(self) -> Locator:
        """The line about the last answer."""

    @abstractmethod
    def banner(self) -> Locator:
        """The error message."""

    @abstractmethod
    def switch_language(self, name: str) -> None: ...

    @abstractmethod
    def enable_tools(self) -> None:
        """Switch tool calling on in the sidebar."""


class GradioDriver(ChatDriver):
    input_selector = "#question textarea"

    def wait_until_idle(self) -> None:
        """The page loads the models, and opens its sidebar on wide screens."""
        expect(self.page.locator("#model input")).not_to_have_value("")
        viewport = self.page.viewport_size
        assert viewport
        expect(self.sidebar(is_open=viewport["width"] >= 1000)).to_have_count(1)

    def bubbles(self, *roles: str) -> Locator:
        names = {"user": '[data-testid="user"]', "assistant": '[data-testid="bot"]'}
        return self.page.locator(", ".join(f"{names[role]}:not(:has(.footer, .document))" for role in roles))

    def button(self, name: str) -> Locator:
        return self.page.locator(f"button#{name}")

    def action(self, name: str) -> Locator:
        return self.page.locator(f"button.act[name={name}]")

    def edit_field(self) -> Locator:
        return self.page.locator("#edit_text textarea")

    def open_manage(self) -> None:
        self.open_sidebar()
        if not self.button("export").is_visible():
            self.page.locator("#manage > button").click()

    def listed(self) -> list[str]:
        return self.page.locator("#conversations label span").all_inner_texts()

    def choose_conversation(self, title: str, number: int = 0) -> None:
        self.page.locator("#conversations label", has_text=title).nth(number).click()

    def import_file(self, file: Path) -> None:
        self._choose(self.button("import_file"), file)

    def attach(self, file: Path) -> None:
        self._choose(self.button("attach"), file)

    def _choose(self, button: Locator, file: Path) -> None:
        with self.page.expect_file_chooser() as chooser:
            button.click()
        chooser.value.set_files(file)

    def stop_button(self) -> Locator:
        return self.page.locator('#question [data-testid="stop-button"], #question .stop-button')

    def status(self) -> Locator:
        return self.page.locator("#status")

    def banner(self) -> Locator:
        return self.page.locator("#banner")

    def sidebar(self, is_open: bool) -> Locator:
        return self.page.locator(".sidebar.open" if is_open else ".sidebar:not(.open)")

    def toggle_sidebar(self) -> None:
        self.page.locator("button.toggle-button").first.click()

    def field(self, name: str) -> Locator:
        if name == "tools":
            return self.page.locator("#tools .cm-content")
        return self.page.locator(f"#{name} textarea, #{name} input").first

    def switch_language(self, name: str) -> None:
        self.page.locator("#language label", has_text=name).click()

    def enable_tools(self) -> None:
        self.setting("system")
        self.page.locator("#tool_mode input").check()
        expect(self.page.locator("#tools .cm-content")).to_be_visible()


class StreamlitDriver(ChatDriver):
    input_selector = "[data-testid=stChatInputTextArea]"
    attaches_on_submit = True
    text_selector = "[data-testid=stMarkdown], [data-testid=stText], [data-testid=stCaptionContainer]"

    def wait_until_idle(self) -> None:
        """Wait for the end of the script run."""
        expect(self.page.locator('[data-testid="stApp"][data-test-script-state="notRunning"]')).to_have_count(1)

    def wait_for_answer(self) -> None:
        super().wait_for_answer()
        self.wait_until_idle()  # the buttons are drawn before the last text

    def bubbles(self, *roles: str) -> Locator:
        names = {"user": "stChatMessageAvatarUser", "assistant": "stChatMessageAvatarAssistant"}
        avatars = ", ".join(f'[data-testid="{names[role]}"]' for role in roles)
        return self.page.locator(f'[data-testid="stChatMessage"]:has({avatars})')

    def button(self, name: str) -> Locator:
        return self.page.locator(f".st-key-{name} button").last  # exists twice while a run moves it down

    def click(self, name: str) -> None:
        self.wait_until_idle()
        super().click(name)

    def act(self, name: str, number: int = -1) -> None:
        self.wait_until_idle()
        super().act(name, number)

    def action(self, name: str) -> Locator:
        return self.page.locator(f"[class*='st-key-{name}-'] button:visible")

    def edit_field(self) -> Locator:
        return self.page.locator(".st-key-edit_text textarea")

    def open_manage(self) -> None:
        self.open_sidebar()
        if not self.button("export").is_visible():
            self.page.get_by_text(re.compile("^(管理对话|Manage conversations)$")).click()

    def listed(self) -> list[str]:
        return self.page.locator(".st-key-conversations button").all_inner_texts()

    def choose_conversation(self, title: str, number: int = 0) -> None:
        self.page.locator(".st-key-conversations button", has_text=title).nth(number).click()

    def import_file(self, file: Path) -> None:
        self.page.locator(".st-key-import_file input[type=file]").set_input_files(file)

    def attach(self, file: Path) -> None:
        self.page.locator(".st-key-question input[type=file]").set_input_files(file)
        expect(self.page.get_by_role("button", name=f"Remove {file.name}")).to_be_visible()
        # until a document is uploaded, Streamlit ignores Enter and keeps the draft
        expect(self.page.get_by_test_id("stChatInputSubmitButton")).to_be_enabled()

    def stop_button(self) -> Locator:
        return self.page.locator(".st-key-stop button")

    def status(self) -> Locator:
        return self.page.locator('.st-key-status [data-testid="stCaptionContainer"]')

    def banner(self) -> Locator:
        return self.page.locator('[data-testid="stAlert"]').last

    def sidebar(self, is_open: bool) -> Locator:
        return self.page.locator(f'[data-testid="stSidebar"][data-collapsed="{"false" if is_open else "true"}"]')

    def toggle_sidebar(self) -> None:
        expand = self.page.locator('[data-testid="stExpandSidebarButton"]')
        collapse = self.page.locator('[data-testid="stSidebarCollapseButton"] button')
        if self.sidebar(is_open=False).count():
            expand.click()
        else:
            self.page.get_by_test_id("stSidebarHeader").hover()  # the button is visible under the pointer only
            collapse.click()

    def field(self, name: str) -> Locator:
        return self.page.locator(f".st-key-{name} textarea, .st-key-{name} input").first

    def switch_language(self, name: str) -> None:
        self.page.get_by_text(name, exact=True).click()

    def enable_tools(self) -> None:
        self.setting("model")
        self.page.locator(".st-key-tool_mode label").click()
        expect(self.page.locator(".st-key-tools textarea")).to_be_visible()


DRIVERS: dict[str, type[ChatDriver]] = {"gradio": GradioDriver, "streamlit": StreamlitDriver}
