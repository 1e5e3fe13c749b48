"""The two chat pages as a visitor handles them, so that one test runs on both."""

from abc import ABC, abstractmethod

from playwright.sync_api import Locator, Page, expect

SECONDS = 1000  # playwright counts in milliseconds


class ChatDriver(ABC):
    """What the pages have in common; a question is an engine's script (see scripted_engine)."""

    field: str
    send_on: str = "Enter"

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.address = address

    def open(self) -> "ChatDriver":
        self.page.goto(self.address)
        expect(self.page.locator(self.field)).to_be_enabled(timeout=20 * SECONDS)
        self.settle()
        return self

    @abstractmethod
    def settle(self) -> None:
        """Wait until the page has asked the server for its models."""

    def send(self, text: str) -> None:
        """Send, without waiting for the answer."""
        expect(self.page.locator(self.field)).to_be_enabled(timeout=15 * SECONDS)
        self.page.locator(self.field).fill(text)
        self.page.locator(self.field).press("Enter")
        expect(self.of("user").last).to_be_visible(timeout=10 * SECONDS)

    def ask(self, text: str) -> str:
        """Send and wait for the whole answer; the answer."""
        before = self.of("assistant").count()
        self.send(text)
        expect(self.of("assistant")).to_have_count(before + 1, timeout=15 * SECONDS)
        self.wait()
        expect(self.body(self.of("assistant").last)).not_to_be_empty(timeout=10 * SECONDS)
        return self.answer()

    def wait(self) -> None:
        """Until no answer grows any more."""
        expect(self.stop_button()).to_have_count(0, timeout=15 * SECONDS)
        expect(self.button("regenerate")).to_be_enabled(timeout=15 * SECONDS)

    def answer(self) -> str:
        return self.text(self.of("assistant").last)

    def texts(self) -> list[str]:
        """All that was said, in order of the page."""
        return [self.text(bubble) for bubble in self.of("user", "assistant").all()]

    def text(self, bubble: Locator) -> str:
        return self.body(bubble).inner_text().replace("\u2060", "").strip()

    def language(self, name: str) -> None:
        self.page.get_by_text(name, exact=True).click()

    def fill(self, name: str, text: str) -> None:
        """Type into a setting and leave it."""
        box = self.setting(name)
        box.fill(text)
        box.blur()
        self.page.wait_for_timeout(400)

    def models(self) -> list[str]:
        """What the chooser offers."""
        self.setting("model").click()
        options = self.page.locator("[role=option]")
        expect(options.first).to_be_visible()
        return [text.removeprefix("✓").strip() for text in options.all_inner_texts()]

    def choose_model(self, name: str) -> None:
        self.setting("model").click()
        self.page.locator("[role=option]", has_text=name).click()
        self.page.wait_for_timeout(700)

    @abstractmethod
    def of(self, *roles: str) -> Locator:
        """The bubbles of these speakers, in order of the page."""

    @abstractmethod
    def body(self, bubble: Locator) -> Locator:
        """What a bubble says, without buttons and pictures."""


class GradioDriver(ChatDriver):
    field = "#question textarea"

    def settle(self) -> None:
        expect(self.page.locator("#model input")).not_to_have_value("", timeout=15 * SECONDS)
        self.page.wait_for_timeout(300)

    def of(self, *roles: str) -> Locator:
        names = {"user": '[data-testid="user"]', "assistant": '[data-testid="bot"]'}
        return self.page.locator(", ".join(names[role] for role in roles))

    def body(self, bubble: Locator) -> Locator:
        return bubble

    def button(self, name: str) -> Locator:
        return self.page.locator(f"button#{name}")

    def stop_button(self) -> Locator:
        return self.page.locator('#question [data-testid="stop-button"], #question .stop-button')

    def status(self) -> Locator:
        return self.page.locator("#status")

    def banner(self) -> Locator:
        return self.page.locator("#banner")

    def setting(self, name: str) -> Locator:
        if not self.page.locator("#settings.open, .sidebar.open").count():
            self.page.locator("button.toggle-button").first.click()
        if name == "tools":
            return self.page.locator("#tools .cm-content")
        return self.page.locator(f"#{name} textarea, #{name} input").first

    def close_settings(self) -> None:
        self.page.locator("button.toggle-button").first.click()
        self.page.wait_for_timeout(400)

    def tool_mode(self) -> None:
        self.setting("system")
        self.page.locator("#tool_mode input").check()
        expect(self.page.locator("#tools .cm-content")).to_be_visible()


class StreamlitDriver(ChatDriver):
    field = "[data-testid=stChatInputTextArea]"

    def settle(self) -> None:
        """The field comes with the models."""

    def of(self, *roles: str) -> Locator:
        names = {"user": "stChatMessageAvatarUser", "assistant": "stChatMessageAvatarAssistant"}
        avatars = ", ".join(f'[data-testid="{names[role]}"]' for role in roles)
        return self.page.locator(f'[data-testid="stChatMessage"]:has({avatars})')

    def body(self, bubble: Locator) -> Locator:
        return bubble.locator('[data-testid="stMarkdown"]').first

    def button(self, name: str) -> Locator:
        return self.page.locator(f".st-key-{name} button")

    def stop_button(self) -> Locator:
        return self.page.locator(".st-key-stop button")

    def status(self) -> Locator:
        return self.page.locator('[data-testid="stBottom"] [data-testid="stCaptionContainer"]')

    def banner(self) -> Locator:
        return self.page.locator('[data-testid="stAlert"]')

    def setting(self, name: str) -> Locator:
        box = self.page.locator(f".st-key-{name} textarea, .st-key-{name} input").first
        place = box.bounding_box()
        if not place or place["x"] < 0:  # the side bar is shut
            self.page.locator('[data-testid="stExpandSidebarButton"]').click()
        return box

    def close_settings(self) -> None:
        self.page.locator('[data-testid="stSidebarCollapseButton"] button').click()
        self.page.wait_for_timeout(400)

    def tool_mode(self) -> None:
        self.setting("model")
        self.page.locator(".st-key-tool_mode label").click()
        expect(self.page.locator(".st-key-tools textarea")).to_be_visible()


DRIVERS = {"gradio": GradioDriver, "streamlit": StreamlitDriver}
