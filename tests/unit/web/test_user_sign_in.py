"""Sign-in of users with names: the form, sessions and their end, the limit on guesses, and what the page gets."""

import asyncio
import base64
import hashlib
import re
import time
from pathlib import Path
from urllib.parse import urlencode

import pytest
from asgi import run, send_async

from entrypoints.web import user_sign_in
from entrypoints.web.access import SECURITY_HEADERS, AccessMiddleware
from entrypoints.web.user_sign_in import IDLE_SECONDS, MAX_SESSION_SECONDS, UserSignIn, signed_in_user, user_name
from entrypoints.web.users import PageUser, UserFile, put_user

# of the password `geheimnis`, with parameters that take no time
HASH = hashlib.scrypt(b"geheimnis", salt=b"salt", n=2, r=1, p=1, dklen=32)
FAST = f"scrypt$1$1$1${base64.b64encode(b'salt').decode()}${base64.b64encode(HASH).decode()}"
HTML = {"accept": "text/html"}


class Page:
    """A page with the users anna and 王小明, which answers with the name that it got."""

    def __init__(self, folder: Path, root: str = "") -> None:
        self.now = 1000.0
        self.file = folder / "users"
        put_user(self.file, PageUser("anna", FAST, "glm-annas-key"))
        put_user(self.file, PageUser("王小明", FAST))
        self.sign_in = UserSignIn(UserFile(self.file), root, clock=lambda: self.now)
        self.app = AccessMiddleware(self._page, self.sign_in)
        self.root = root

    async def _page(self, scope, receive, send) -> None:
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": f"page of {user_name(headers)}".encode()})

    def send(self, method, path, headers=None, body=b"", peer="192.0.2.1"):
        async def app(scope, receive, send) -> None:
            place = {"client": (peer, 5), "server": ("127.0.0.1", 7860), "scheme": "http"}
            await self.app({**scope, **place}, receive, send)

        return run(send_async(app, method, path, content=body, headers=headers or {}))

    def enter(self, name="anna", password="geheimnis", headers=None, peer="192.0.2.1"):
        body = urlencode({"name": name, "password": password}).encode()
        return self.send("POST", f"{self.root}/sign-in", {**HTML, **(headers or {})}, body, peer)

    def cookie(self, **fields) -> dict[str, str]:
        return {**HTML, "cookie": self.enter(**fields).headers["set-cookie"].split(";")[0]}


@pytest.fixture
def page(tmp_path):
    return Page(tmp_path)


def test_a_visitor_gets_the_form_in_their_language_and_nothing_else(page):
    reply = page.send("GET", "/any/path", {**HTML, "accept-language": "zh-CN"})
    text = reply.body.decode()
    assert reply.status == 401
    assert '<html lang="zh">' in text
    assert re.findall("<label>(.*)", text) == ["用户名", "密码"]
    assert SECURITY_HEADERS.items() <= reply.headers.items()
    assert page.send("GET", "/asset.js").body == b"password required\n"
    assert page.send("POST", "/gradio_api/queue/join", HTML).status == 401
    assert page.send("GET", "/healthz").status == 200


@pytest.mark.parametrize("name", ["anna", "王小明"])
def test_a_user_signs_in_and_the_page_gets_the_name(name, page):
    reply = page.enter(name)
    assert (reply.status, reply.headers["location"]) == (303, "/")
    parts = {part.strip() for part in reply.headers["set-cookie"].split(";")[1:]}
    assert parts == {"HttpOnly", "SameSite=Strict", "Path=/"}
    cookie = reply.headers["set-cookie"].split(";")[0]
    assert page.send("GET", "/", {"cookie": f"other=1; {cookie}"}).body.decode() == f"page of {name}"


def test_a_client_cannot_name_itself_to_the_page(page, tmp_path):
    cookie = page.cookie(name="anna")
    assert page.send("GET", "/", {**cookie, "X-Page-User": "boss"}).body == b"page of anna"
    open_page = AccessMiddleware(page._page)
    reply = run(send_async(open_page, "GET", "/", headers={"host": "127.0.0.1", "x-page-user": "boss"}))
    assert reply.body == b"page of "


@pytest.mark.parametrize(
    ("name", "password"), [("anna", "wrong"), ("nobody", "geheimnis"), ("", ""), ("Anna", "geheimnis")]
)
def test_a_wrong_name_or_password_shows_the_same_error_in_the_form(name, password, page):
    reply = page.enter(name, password)
    assert reply.status == 401
    assert '<p role="alert">Wrong user name or password</p>' in reply.body.decode()
    assert "set-cookie" not in reply.headers
    assert password == "" or password not in reply.body.decode()


def test_a_name_with_html_is_shown_as_text(page):
    assert '"&quot;&gt;&lt;script&gt;' in page.enter('"><script>').body.decode()


def test_guesses_are_limited_for_all_names_of_a_peer_together(page):
    assert [page.enter(f"user{n}", "guess").status for n in range(6)] == [401] * 5 + [429]
    reply = page.enter()  # the right one is not checked either
    assert (reply.status, reply.headers["retry-after"]) == (429, "10")
    assert "too many wrong passwords; try again in 10 seconds" in reply.body.decode()
    assert page.enter(peer="192.0.2.2").status == 303
    page.now += 10
    assert page.enter().status == 303


def test_parallel_guesses_are_limited_too(page):
    """Each is counted before the next one is checked."""

    async def app(scope, receive, send) -> None:
        await page.app(
            {**scope, "client": ("192.0.2.1", 5), "server": ("127.0.0.1", 7860), "scheme": "http"}, receive, send
        )

    async def guess(number):
        body = urlencode({"name": "anna", "password": f"guess {number}"}).encode()
        return (await send_async(app, "POST", "/sign-in", content=body, headers=HTML)).status

    async def all_guesses():
        return await asyncio.gather(*(guess(number) for number in range(20)))

    assert sorted(run(all_guesses())) == [401] * 5 + [429] * 15


def test_signing_out_ends_the_session(page):
    cookie = page.cookie()
    reply = page.send("GET", "/sign-out", cookie)
    assert reply.status == 200
    assert "Max-Age=0" in reply.headers["set-cookie"]
    assert page.send("GET", "/", cookie).status == 401


def test_a_session_ends_when_it_is_not_used_and_after_a_week(page):
    cookie = page.cookie()
    page.now += IDLE_SECONDS - 1
    assert page.send("GET", "/", cookie).status == 200
    page.now += IDLE_SECONDS + 1
    assert page.send("GET", "/", cookie).status == 401
    cookie = page.cookie()
    for _ in range(int(MAX_SESSION_SECONDS / IDLE_SECONDS)):
        page.now += IDLE_SECONDS - 1
        page.send("GET", "/", cookie)
    page.now += IDLE_SECONDS - 1
    assert page.send("GET", "/", cookie).status == 401


def test_a_removed_user_and_a_new_password_end_the_sessions(page):
    annas, other = page.cookie(), page.cookie(name="王小明")
    put_user(page.file, PageUser("anna", FAST.replace("scrypt$1$1$1", "scrypt$2$1$1")))
    assert (page.send("GET", "/", annas).status, page.send("GET", "/", other).status) == (401, 200)
    page.file.write_text("# nobody\n")
    assert page.send("GET", "/", other).status == 401


def test_the_number_of_sessions_is_bounded(page, monkeypatch):
    monkeypatch.setattr(user_sign_in, "MAX_SESSIONS", 2)
    first, second, third = (page.cookie() for _ in range(3))
    assert [page.send("GET", "/", cookie).status for cookie in (first, second, third)] == [401, 200, 200]


def test_a_form_of_another_site_and_a_huge_form_are_rejected(page):
    assert page.enter(headers={"host": "page.example", "origin": "http://evil.example"}).status == 403
    assert page.enter(headers={"host": "page.example", "origin": "http://page.example"}).status == 303
    assert page.enter(password="x" * 10_000).status == 413


def test_a_websocket_needs_a_session_and_ends_with_it(page):
    cookie = page.cookie()["cookie"]

    def received(headers) -> list[str]:
        sent: list[dict] = []
        seen: list[str] = []
        messages = iter(["websocket.connect", "websocket.receive", "websocket.receive"])

        async def receive():
            kind = next(messages)
            if len(seen) == 2:
                page.send_out()
            return {"type": kind}

        async def keep(message):
            sent.append(message)

        async def app(scope, receive, send):
            for _ in range(3):
                seen.append((await receive())["type"])

        page.app.app = app
        scope = {"type": "websocket", "path": "/_stcore/stream", "scheme": "ws", "client": ("192.0.2.1", 5),
                 "server": ("127.0.0.1", 7860), "headers": headers}  # fmt: skip
        run(page.app(scope, receive, keep))
        return seen or [message["type"] for message in sent]

    page.send_out = lambda: page.sign_in._sessions.clear()
    assert received([]) == ["websocket.close"]
    assert received([(b"cookie", cookie.encode())]) == [
        "websocket.connect", "websocket.receive", "websocket.disconnect",
    ]  # fmt: skip


def test_behind_a_proxy_with_a_path_the_routes_are_below_it(tmp_path):
    page = Page(tmp_path, root="/chat")
    assert 'action="/chat/sign-in"' in page.send("GET", "/chat/", HTML).body.decode()
    reply = page.enter()
    assert (reply.status, reply.headers["location"]) == (303, "/chat/")
    assert "Path=/chat" in reply.headers["set-cookie"]


def test_the_page_gets_the_api_key_of_the_user(page):
    headers = {user_sign_in.USER_HEADER: f"{user_sign_in.PROOF}:anna"}
    assert signed_in_user(headers, f"{page.file}").api_key == "glm-annas-key"
    assert signed_in_user({}, f"{page.file}") is None
    assert signed_in_user(headers, "") is None


def test_an_unknown_name_takes_as_long_as_a_known_one(tmp_path):
    """Both hash a password with the full parameters; without that, an unknown name would be a thousand times faster."""
    page = Page(tmp_path)
    begin = time.process_time()
    page.enter("nobody", "geheimnis")
    assert time.process_time() - begin > 0.02


def test_the_log_names_the_user_and_no_password(page, caplog):
    caplog.set_level("INFO")
    page.enter()
    page.enter("anna", "nearly geheimnis")
    assert "user anna signed in" in caplog.text
    assert "geheimnis" not in caplog.text
