"""Users sign in to a page with their names, in a real browser."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from entrypoints.web.users import PageUser, hash_password, put_user

SIZES = {"wide": (1400, 900), "middle": (900, 900), "narrow": (390, 844)}


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("users") / "users.txt"
    put_user(file, PageUser("王小明", hash_password("correct horse")))
    return file


@pytest.fixture(scope="module", params=["training", "streamlit", "gradio"])
def address(request: pytest.FixtureRequest, users: Path, serve_page: Callable, tmp_path_factory) -> str:
    source = (
        ("--output-dir", tmp_path_factory.mktemp("run"))
        if request.param == "training"
        else ("--api", "http://127.0.0.1:1")
    )
    return serve_page(request.param, *source, "--users-file", users).address


@pytest.fixture(scope="module")
def form_address(users: Path, serve_page: Callable, tmp_path_factory: pytest.TempPathFactory) -> str:
    return serve_page("training", "--output-dir", tmp_path_factory.mktemp("run"), "--users-file", users).address


def enter(page: Page, password: str) -> None:
    page.get_by_label("User name").fill("王小明")
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Sign in").click()


def test_a_user_signs_in_sees_the_name_and_signs_out(address, new_page):
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_layout_of_the_sign_in_form_is_correct(size, scheme, form_address, new_page, screenshots):
    page = new_page(*SIZES[size], color_scheme=scheme)
    page.goto(form_address)
    expect(page.get_by_label("用户名")).to_be_focused()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.screenshot(path=screenshots / f"sign-in-{size}-{scheme}.png")
