"""Users sign in to a page with their names, in a real browser, and their conversations are on the server."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_drivers import DRIVERS, ChatDriver
from playwright.sync_api import Page, expect
from playwright.sync_api import TimeoutError as PlaywrightTimeoutError
from processes import PAGE_KEY

from entrypoints.web.users import PageUser, hash_password, put_user

pytestmark = pytest.mark.slow

SIZES = {"wide": (1400, 900), "middle": (900, 900), "narrow": (390, 844)}


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("users") / "users.txt"
    for name in ("王小明", "Anna"):
        put_user(file, PageUser(name, hash_password("correct horse")))
    return file


@pytest.fixture(scope="module")
def addresses(users: Path, scripted_api, serve_page: Callable, tmp_path_factory) -> Callable[[str], str]:
    """The URL of each page, which starts when it is first needed."""
    found: dict[str, str] = {}

    def get(kind: str) -> str:
        if kind not in found:
            source = ("--api", scripted_api.url, "--api-key-env", "PAGE_KEY", "--conversations", "server")
            source += ("--state-dir", tmp_path_factory.mktemp("state"))
            if kind == "training":
                source = ("--output-dir", tmp_path_factory.mktemp("run"))
            found[kind] = serve_page(kind, *source, "--users-file", users, PAGE_KEY=PAGE_KEY).address
        return found[kind]

    return get


def enter(page: Page, password: str, name: str = "王小明") -> None:
    page.get_by_label("User name").fill(name)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Sign in").click()


def sign_in(page: Page, ui: str, address: str, name: str) -> ChatDriver:
    page.goto(f"{address}sign-out")
    enter(page, "correct horse", name)
    page.wait_for_url(address)
    chat = DRIVERS[ui](page, address)
    expect(chat.input()).to_be_enabled()
    chat.wait_until_idle()
    return chat


def test_conversations_on_the_server_follow_their_user_and_nobody_else_sees_them(ui, addresses, new_page):
    address = addresses(ui)
    page = new_page(locale="en-US")
    chat = sign_in(page, ui, address, "王小明")
    chat.ask("say 苹果")
    chat.ask("say 梨")
    chat.wait_for(lambda: chat.listed() == ["say 苹果"])
    elsewhere = sign_in(new_page(locale="en-US"), ui, address, "王小明")
    elsewhere.open_sidebar()
    elsewhere.choose_conversation("say 苹果")
    elsewhere.expect_texts("say 苹果", "苹果", "say 梨", "梨")
    elsewhere.ask("say 桃")
    chat.wait_for(lambda: ":c:" not in str(page.evaluate("Object.keys(localStorage)")))
    # on the same computer another user signs in, while the tab of the first one is still open
    other = sign_in(page.context.new_page(), ui, address, "Anna")
    other.expect_texts()
    assert other.listed() == []
    refused = page.get_by_text("Another user has signed in; reload this page")

    def is_refused() -> bool:  # Streamlit first connects again, with the cookie of the other user
        page.evaluate("document.querySelector('.st-key-clear button, button#clear')?.click()")
        with contextlib.suppress(PlaywrightTimeoutError):
            refused.wait_for(timeout=3000)
        return refused.is_visible()

    chat.wait_for(is_refused)
    elsewhere.page.reload()
    elsewhere.open()
    elsewhere.expect_texts("say 苹果", "苹果", "say 梨", "梨", "say 桃", "桃")
    elsewhere.open_manage()
    elsewhere.click("delete_conversation")
    elsewhere.click("confirm_delete_conversation")
    elsewhere.wait_for(lambda: elsewhere.listed() == [])


@pytest.mark.parametrize("kind", ["training", "streamlit", "gradio"])
def test_a_user_signs_in_sees_the_name_and_signs_out(kind, addresses, new_page):
    address = addresses(kind)
    page = new_page(locale="en-US")
    page.goto(address)
    enter(page, "wrong")
    expect(page.get_by_role("alert")).to_have_text("Wrong user name or password")
    enter(page, "correct horse")
    if "gradio" not in page.content():
        expect(page.get_by_text("王小明")).to_be_visible()
        page.get_by_role("link", name="Sign out").click()
        expect(page.get_by_label("Password")).to_be_visible()
    else:
        expect(page.locator("gradio-app, .gradio-container").first).to_be_visible()
        page.goto(f"{address}sign-out")
    page.goto(address)
    expect(page.get_by_label("Password")).to_be_visible()


def test_the_layout_of_the_sign_in_form_is_correct(addresses, new_page, screenshots):
    page = new_page()
    page.goto(addresses("training"))
    expect(page.get_by_label("用户名")).to_be_focused()
    for name, (width, height) in SIZES.items():
        page.set_viewport_size({"width": width, "height": height})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.screenshot(path=screenshots / f"sign-in-{name}-{scheme}.png")
