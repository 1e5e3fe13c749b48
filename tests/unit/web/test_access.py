"""Who may use a page without a password: known names in the Host header only, also for WebSockets."""

import asyncio

import pytest
from asgi import send

from entrypoints.web.access import SECURITY_HEADERS, AccessMiddleware
from entrypoints.web.sign_in import SignIn


async def _page(scope, receive, send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"page"})


def websocket_is_accepted(app: AccessMiddleware, host: str, origin: str | None) -> bool:
    """Whether the application behind the middleware sees a WebSocket connection."""
    sent: list[dict] = []

    async def record(message: dict) -> None:
        sent.append(message)

    async def accept(scope, receive, send) -> None:
        await send({"type": "websocket.accept"})

    app.app = accept
    headers = [(b"host", host.encode()), *([(b"origin", origin.encode())] if origin else [])]
    scope = {"type": "websocket", "path": "/_stcore/stream", "scheme": "ws", "headers": headers, "client": None}
    asyncio.run(app(scope, None, record))
    return [message["type"] for message in sent] == ["websocket.accept"]


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "[::1]:7860", "10.1.2.3", "web:7860", "LLM.corp"])
def test_addresses_loopback_and_allowed_names_are_accepted(host):
    reply = send(AccessMiddleware(_page, None, ("0.0.0.0", "web", "llm.corp")), "GET", "/", headers={"host": host})
    assert (reply.status, reply.body) == (200, b"page")
    assert SECURITY_HEADERS.items() <= reply.headers.items()


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("host", ["evil.example:7860", "127.0.0.1.evil.example", "localhost@evil.example", "a:b:c"])
def test_a_page_under_a_foreign_name_cannot_be_read(host, method):
    """DNS rebinding: the browser sends an Origin that equals the Host."""
    app = AccessMiddleware(_page, None, ("127.0.0.1",))
    reply = send(app, method, "/", headers={"host": host, "origin": f"http://{host}"})
    assert reply.status == 403
    assert f"the host '{host}' is not allowed; add it with --allowed-host, or set PAGE_PASSWORD" in reply.body.decode()
    assert send(app, "GET", "/healthz", headers={"host": host}).status == 200


def test_a_foreign_name_is_reported_in_the_language_of_the_browser_and_cut_off():
    app = AccessMiddleware(_page)
    reply = send(app, "GET", "/", headers={"host": "x" * 5000 + "\xe4", "accept-language": "zh"})
    assert reply.status == 403
    assert reply.body.decode().startswith("不允许使用主机名 'xxx")
    assert len(reply.body) < 400


@pytest.mark.parametrize(
    ("host", "origin", "accepted"),
    [
        ("127.0.0.1:1", "http://127.0.0.1:1", True),
        ("127.0.0.1:1", None, True),
        ("127.0.0.1:1", "http://evil.example", False),
        ("127.0.0.1:1", "http://127.0.0.1:2", False),
        ("127.0.0.1:1", "null", False),
        ("evil.example:1", "http://evil.example:1", False),
        ("evil.example:1", None, False),
    ],
)
def test_a_script_of_another_site_cannot_open_a_websocket(host, origin, accepted):
    """Streamlit would reject it too, but only after querying an internet service for our address."""
    assert websocket_is_accepted(AccessMiddleware(_page), host, origin) is accepted


def test_with_a_password_any_name_is_accepted_and_a_websocket_needs_the_password():
    app = AccessMiddleware(_page, SignIn("geheim"))
    right = {"host": "any.example", "authorization": "Basic YW55OmdlaGVpbQ=="}
    assert send(app, "GET", "/", headers=right).status == 200
    assert send(app, "GET", "/", headers={"host": "any.example"}).status == 401
    assert not websocket_is_accepted(app, "any.example", "http://any.example")
    assert send(app, "GET", "/healthz").status == 200
