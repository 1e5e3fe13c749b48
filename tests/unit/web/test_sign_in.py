"""The password of a page: HTTP Basic, the cookie of a visitor who entered it, and the limit on wrong guesses."""

import base64
import sys
import unicodedata

import pytest
from asgi import run, send_async

from entrypoints.web import sign_in
from entrypoints.web.access import AccessMiddleware
from entrypoints.web.sign_in import PEER_GROUPS, GuessLimit, SignIn, TooManyGuesses


async def _page(scope, receive, send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"page"})


class Page:
    """A page with a password, and requests to it from any peer at any time."""

    def __init__(self, password: str = "geheim", path: str = "/") -> None:
        self.now = 1000.0
        self.app = AccessMiddleware(_page, SignIn(password, path, clock=lambda: self.now))

    def get(self, headers=None, password=None, peer="192.0.2.1", scheme="http", port=7860):
        """The response; `password` is sent as a browser would."""
        given = dict(headers or {})
        if password is not None:
            given["authorization"] = basic(password.encode())

        async def app(scope, receive, send) -> None:
            place = {"client": (peer, 5), "server": ("127.0.0.1", port), "scheme": scheme}
            await self.app({**scope, **place}, receive, send)

        return run(send_async(app, "GET", "/", headers=given))


def basic(password: bytes, user: bytes = b"any") -> str:
    return "Basic " + base64.b64encode(user + b":" + password).decode()


def cookie_of(reply) -> str:
    return reply.headers["set-cookie"].split(";")[0]


def test_a_page_with_a_password_rejects_all_other_requests():
    page = Page()
    refused = page.get()
    assert (refused.status, refused.body) == (401, b"password required\n")
    assert refused.headers["www-authenticate"] == 'Basic realm="page", charset="UTF-8"'
    for wrong in ("Basic eDp4", "Basic !", "Basic", "Bearer geheim", "Basic Z2VoZWlt", "", "Basic \xe4", "\xe4 \xff"):
        assert page.get({"authorization": wrong}).status == 401
    assert page.get({"authorization": basic(b"geheim", b"a:b")}).status == 401  # a user name has no colon
    assert page.get(password="geheim").body == b"page"


@pytest.mark.parametrize("cookie", ["page-7860=", "page-7860", "page-7860=\xe4\xff", "\xe4", ";;;"])
def test_another_cookie_is_rejected(cookie):
    assert Page().get({"cookie": cookie}).status == 401


@pytest.mark.parametrize("password", ["密码", "Grüße", "é", "пароль", "a:b", " space ", "🔑"])
def test_a_password_outside_ascii_is_accepted_in_utf_8_and_rejected_in_other_encodings(password):
    page = Page(password)
    assert page.get(password=password).status == 200
    assert page.get(password=unicodedata.normalize("NFD", password)).status == 200  # as some keyboards compose it
    for encoding in ("latin-1", "gb18030"):
        raw = password.encode(encoding, "replace")
        if raw != password.encode():
            assert Page(password).get({"authorization": basic(raw)}).status == 401


def test_a_password_of_the_environment_that_is_not_utf_8_can_be_entered():
    assert Page("caf\udce9").get({"authorization": basic(b"caf\xe9")}).status == 200


def test_the_cookie_is_random_hidden_from_scripts_and_of_this_process():
    replies = [Page().get(password="geheim") for _ in range(2)]
    first, second = map(cookie_of, replies)
    assert first != second  # the same after a restart would be a password equivalent for ever
    assert len(first) > len("page-7860=") + 40
    assert "geheim" not in first
    parts = {part.strip() for part in replies[0].headers["set-cookie"].split(";")[1:]}
    assert parts == {"HttpOnly", "SameSite=Strict", "Path=/"}
    assert Page().get({"cookie": first}).status == 401


def test_a_visitor_with_the_cookie_needs_no_password_and_gets_no_second_cookie():
    page = Page()
    cookie = cookie_of(page.get(password="geheim"))
    reply = page.get({"cookie": f"a=b; {cookie}; c=d"}, peer="198.51.100.7")
    assert (reply.status, "set-cookie" in reply.headers) == (200, False)


@pytest.mark.parametrize(
    ("scheme", "forwarded", "secure"),
    [
        ("http", None, False),
        ("https", None, True),
        ("http", "https", True),
        ("http", "HTTPS, http", True),
        ("http", "http, https", False),
        ("http", "wss", True),
    ],
)
def test_the_cookie_is_secure_where_the_visitor_uses_tls(scheme, forwarded, secure):
    headers = {"x-forwarded-proto": forwarded} if forwarded else {}
    assert ("; Secure" in Page().get(headers, "geheim", scheme=scheme).headers["set-cookie"]) is secure


def test_pages_on_other_ports_and_paths_of_the_same_host_keep_their_cookies():
    gradio, streamlit = (cookie_of(Page().get(password="geheim", port=port)) for port in (7860, 8501))
    assert gradio.split("=")[0] != streamlit.split("=")[0]
    assert "Path=/chat" in Page(path="/chat").get(password="geheim").headers["set-cookie"]


def test_after_five_wrong_passwords_a_peer_waits_ten_seconds_for_each_guess():
    page = Page()
    assert [page.get(password=f"guess {number}").status for number in range(6)] == [401] * 5 + [429]
    refused = page.get({"accept-language": "zh-CN"}, "geheim")  # the right one is not checked either
    assert (refused.status, refused.headers["retry-after"]) == (429, "10")
    assert refused.body.decode() == "密码错误次数过多，请在 10 秒后重试\n"
    page.now += 9
    assert page.get(password="geheim").body == b"too many wrong passwords; try again in 1 seconds\n"
    page.now += 1
    assert page.get(password="one more").status == 401
    assert page.get(password="geheim").status == 429
    page.now += 10
    assert page.get(password="geheim").status == 200


def test_another_peer_and_visitors_who_are_signed_in_do_not_wait():
    page = Page()
    cookie = cookie_of(page.get(password="geheim"))
    assert [page.get(password=f"guess {number}").status for number in range(6)][-1] == 429
    assert page.get({"cookie": cookie}).status == 200
    assert page.get(password="geheim", peer="192.0.2.2").status == 200


def test_an_open_tab_that_repeats_an_old_password_does_not_lock_its_visitor_out():
    page = Page()
    assert {page.get(password="of last week").status for _ in range(100)} == {401}
    assert page.get(password="geheim").status == 200


def test_requests_without_a_password_are_not_guesses():
    page = Page()
    assert {page.get().status for _ in range(100)} == {401}
    assert {page.get({"authorization": "Basic !"}).status for _ in range(100)} == {401}
    assert page.get(password="geheim").status == 200


def guesses(limit: GuessLimit, peers: list[str]) -> int:
    """How many wrong passwords are checked, one from each peer."""
    checked = 0
    for number, peer in enumerate(peers):
        try:
            limit.check(peer, b"guess %d" % number, lambda password: False)
            checked += 1
        except TooManyGuesses:
            pass
    return checked


@pytest.mark.parametrize(
    "peers",
    [
        [f"2001:db8:1:2::{number:x}" for number in range(40)],
        ["192.0.2.1", "::ffff:192.0.2.1"] * 20,
        ["", "unix"] * 3 + [""] * 30,
    ],
    ids=["one IPv6 subscriber", "IPv4 in IPv6", "no address"],
)
def test_addresses_of_one_subscriber_count_as_one_peer(peers):
    assert 5 <= guesses(GuessLimit(clock=lambda: 1.0), peers) <= 8


def test_many_addresses_together_have_a_limit_too():
    now = 1.0
    limit = GuessLimit(clock=lambda: now)
    peers = [f"198.51.{number // 250}.{number % 250}" for number in range(1000)]
    assert guesses(limit, peers) == 50
    now += 30
    assert guesses(limit, [f"203.0.113.{number}" for number in range(250)]) == 30


def test_the_memory_of_the_limit_does_not_grow_with_the_peers(monkeypatch):
    monkeypatch.setattr(sign_in, "TOTAL_GUESSES", 10**9)
    limit = GuessLimit(clock=lambda: 1.0)
    guesses(limit, [f"2001:db8:{number:x}::1" for number in range(5000)])
    stored = [value for value in vars(limit).values() if isinstance(value, list)]
    assert [len(value) for value in stored] == [PEER_GROUPS] * 2
    assert sum(sys.getsizeof(item) for value in stored for item in value) < 1 << 20


def test_the_log_names_the_peer_of_a_wrong_password_and_not_the_password(caplog):
    page = Page()
    page.get(password="nearly geheim")
    assert "wrong page password from 192.0.2.1" in caplog.text
    assert "geheim" not in caplog.text
