"""The two chat pages as a visitor handles them, so that one test runs on both."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable

from browsing import SECONDS
from playwright.sync_api import Locator, Page, expect
from scripted_engine import wait_until


class ChatDriver(ABC):
    """What the pages have in common; a question is an engine's script (see scripted_engine).

    A page shows what happened a while after it did: nothing here reads a text once and takes it for the last word.
    """

    field: str
    words: str | None = None  # what a bubble says, without buttons and pictures; None: all of it

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.address = address

    def open(self) -> "ChatDriver":
        self.page.goto(self.address)
        expect(self.page.locator(self.field)).to_be_enabled()
        self.settle()
        return self

    @abstractmethod
    def settle(self) -> None:
        """Wait until the page has done what it does by itself."""

    def enter(self, text: str) -> None:
        """Type into the field and press Enter."""
        expect(self.page.locator(self.field)).to_be_enabled()
        self.page.locator(self.field).fill(text)
        self.page.locator(self.field).press("Enter")

    def send(self, text: str) -> None:
        """Send, and wait until the question stands on the page; the answer may not have begun."""
        asked = self.of("user").count()
        self.enter(text)
        expect(self.of("user")).to_have_count(asked + 1)

    def ask(self, text: str, answer: str | re.Pattern | None = None) -> None:
        """Send, and wait for the whole answer: the words after `say` if nothing else is named."""
        wanted = text.removeprefix("say ") if answer is None else answer
        before = self.of("assistant").count()
        self.send(text)
        expect(self.of("assistant")).to_have_count(before + 1)
        if isinstance(wanted, str):
            self.await_text(lambda: self.answer() == wanted)
        else:
            self.await_text(lambda: wanted.search(self.answer()))
        self.wait()

    def wait(self) -> None:
        """Until no answer grows any more; returns at once where none has begun."""
        expect(self.stop_button()).to_have_count(0)
        expect(self.button("regenerate")).to_be_enabled()

    def press(self, name: str) -> None:
        """Click a button."""
        self.button(name).click()

    def answer(self) -> str:
        """The last one as it stands now."""
        return ["", *self.texts("assistant")][-1]

    def texts(self, *roles: str) -> list[str]:
        """All that these said, in order of the page, as it stands now."""
        script = "(bubbles, words) => bubbles.map(b => (words ? b.querySelector(words) : b)?.innerText ?? '')"
        found = self.of(*(roles or ("user", "assistant"))).evaluate_all(script, self.words)
        return [text.replace("\u2060", "").strip() for text in found]

    def shows(self, *texts: str) -> None:
        """Wait until these are all that was said."""
        self.await_text(lambda: self.texts() == [*texts])

    def await_text(self, condition: Callable[[], object]) -> None:
        """Wait until it holds; AssertionError with what was said instead."""
        try:
            wait_until(condition, SECONDS)
        except AssertionError as error:
            raise AssertionError(f"the page shows {self.texts()}") from error

    def language(self, name: str) -> None:
        self.page.get_by_text(name, exact=True).click()

    def fill(self, name: str, text: str) -> None:
        """Type into a setting and leave it."""
        box = self.setting(name)
        box.fill(text)
        box.blur()

    def models(self) -> list[str]:
        """What the chooser offers."""
        self.setting("model").click()
        options = self.page.locator("[role=option]")
        expect(options.first).to_be_visible()
        return [text.removeprefix("✓").strip() for text in options.all_inner_texts()]

    def choose_model(self, name: str) -> None:
        self.setting("model").click()
        self.page.locator("[role=option]", has_text=name).click()

    def setting(self, name: str) -> Locator:
        """A field of the side bar, which is opened if it is shut."""
        if self.side_bar(open=False).count():
            self.toggle_settings()
            expect(self.side_bar(open=True)).to_have_count(1)
        return self.box(name)

    def close_settings(self) -> None:
        self.toggle_settings()
        expect(self.side_bar(open=False)).to_have_count(1)

    @abstractmethod
    def of(self, *roles: str) -> Locator:
        """The bubbles of these speakers, in order of the page."""

    @abstractmethod
    def side_bar(self, open: bool) -> Locator:
        """It, while it is open or shut."""

    @abstractmethod
    def toggle_settings(self) -> None:
        """Open or shut it."""

    @abstractmethod
    def box(self, name: str) -> Locator:
        """The field of a setting."""


class GradioDriver(ChatDriver):
    field = "#question textarea"

    def settle(self) -> None:
        """It asks for the models, and opens its settings where there is room."""
        expect(self.page.locator("#model input")).not_to_have_value("")
        expect(self.side_bar(open=self.page.viewport_size["width"] >= 1000)).to_have_count(1)

    def of(self, *roles: str) -> Locator:
        names = {"user": '[data-testid="user"]', "assistant": '[data-testid="bot"]'}
        return self.page.locator(", ".join(names[role] for role in roles))

    def button(self, name: str) -> Locator:
        return self.page.locator(f"button#{name}")

    def stop_button(self) -> Locator:
        return self.page.locator('#question [data-testid="stop-button"], #question .stop-button')

    def status(self) -> Locator:
        return self.page.locator("#status")

    def banner(self) -> Locator:
        return self.page.locator("#banner")

    def side_bar(self, open: bool) -> Locator:
        return self.page.locator(".sidebar.open" if open else ".sidebar:not(.open)")

    def toggle_settings(self) -> None:
        self.page.locator("button.toggle-button").first.click()

    def box(self, name: str) -> Locator:
        if name == "tools":
            return self.page.locator("#tools .cm-content")
        return self.page.locator(f"#{name} textarea, #{name} input").first

    def tool_mode(self) -> None:
        self.setting("system")
        self.page.locator("#tool_mode input").check()
        expect(self.page.locator("#tools .cm-content")).to_be_visible()


class StreamlitDriver(ChatDriver):
    field = "[data-testid=stChatInputTextArea]"
    words = "[data-testid=stMarkdown]"

    def settle(self) -> None:
        """The field comes with the models, and the run that brought it ends."""
        expect(self.page.locator('[data-testid="stApp"][data-test-script-state="notRunning"]')).to_have_count(1)

    def wait(self) -> None:
        super().wait()
        self.settle()  # the buttons come before the last text

    def of(self, *roles: str) -> Locator:
        names = {"user": "stChatMessageAvatarUser", "assistant": "stChatMessageAvatarAssistant"}
        avatars = ", ".join(f'[data-testid="{names[role]}"]' for role in roles)
        return self.page.locator(f'[data-testid="stChatMessage"]:has({avatars})')

    def button(self, name: str) -> Locator:
        return self.page.locator(f".st-key-{name} button").last  # while a run moves it down, it is there twice

    def press(self, name: str) -> None:
        self.settle()
        super().press(name)

    def stop_button(self) -> Locator:
        return self.page.locator(".st-key-stop button")

    def status(self) -> Locator:
        return self.page.locator('[data-testid="stBottom"] [data-testid="stCaptionContainer"]').last

    def banner(self) -> Locator:
        return self.page.locator('[data-testid="stAlert"]').last

    def side_bar(self, open: bool) -> Locator:
        return self.page.locator(f'[data-testid="stSidebar"][data-collapsed="{"false" if open else "true"}"]')

    def toggle_settings(self) -> None:
        expand = self.page.locator('[data-testid="stExpandSidebarButton"]')
        collapse = self.page.locator('[data-testid="stSidebarCollapseButton"] button')
        (expand if self.side_bar(open=False).count() else collapse).click()

    def box(self, name: str) -> Locator:
        return self.page.locator(f".st-key-{name} textarea, .st-key-{name} input").first

    def tool_mode(self) -> None:
        self.setting("model")
        self.page.locator(".st-key-tool_mode label").click()
        expect(self.page.locator(".st-key-tools textarea")).to_be_visible()


DRIVERS = {"gradio": GradioDriver, "streamlit": StreamlitDriver}
