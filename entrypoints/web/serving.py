"""How a page is served: a guard in front of the library's own application, and uvicorn around both."""

import base64
import binascii
import hashlib
import hmac
import logging
import os
import socket
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

from entrypoints.errors import UserError

logger = logging.getLogger(__name__)
# A browser that honours this fetches nothing from any other host, whatever a model writes. The libraries need inline
# scripts and styles, and eval.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
# Of Gradio, none used by our page: reading and writing files, fetching addresses for a visitor, watching others.
REFUSED = ("file", "upload", "proxy", "stream", "monitoring", "deep_link", "runs", "component_server", "vibe")
COOKIE = "page"


class Guard:
    """ASGI: /healthz for all; a password if there is one; no file routes; headers that keep a browser at home."""

    def __init__(self, app: Any, password: str = "") -> None:
        self.app = app
        self.token = hashlib.sha256(f"page:{password}".encode()).hexdigest() if password else ""
        self.password = password

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        """Answer, or hand on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal and scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif refusal:
            await refusal(scope, receive, send)
        else:
            await self.app(scope, receive, self._with_headers(send))

    def _refusal(self, scope: dict) -> PlainTextResponse | None:
        path, headers = scope["path"], Headers(scope=scope)
        if path == "/healthz":
            return PlainTextResponse("alive\n")
        origin = headers.get("origin")
        if scope["type"] == "websocket" and origin and urlsplit(origin).netloc != headers.get("host"):
            return PlainTextResponse("", 403)  # another site's script; Streamlit would ask the internet for our address
        if not self._may_enter(headers):
            challenge = {"www-authenticate": 'Basic realm="page", charset="UTF-8"'}
            return PlainTextResponse("a password is needed\n", 401, challenge)
        _, found, route = path.partition("/gradio_api/")
        name = (route if found else path.rsplit("/", 1)[-1]).split("/")[0].split("=")[0]
        if name in REFUSED and (found or "=" in path or name == "monitoring"):
            return PlainTextResponse("no such page\n", 404)
        return None

    def _may_enter(self, headers: Headers) -> bool:
        if not self.password:
            return True
        cookies = [part.strip() for part in headers.get("cookie", "").split(";")]
        if any(hmac.compare_digest(cookie.encode(), f"{COOKIE}={self.token}".encode()) for cookie in cookies):
            return True  # some browsers send no password with a websocket
        scheme, _, given = headers.get("authorization", "").partition(" ")
        try:
            password = base64.b64decode(given).partition(b":")[2]
        except binascii.Error:
            return False
        return scheme.lower() == "basic" and hmac.compare_digest(password, self.password.encode())

    def _with_headers(self, send: Any) -> Any:
        async def sending(message: dict) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                if self.token:
                    headers.append("set-cookie", f"{COOKIE}={self.token}; HttpOnly; SameSite=Strict; Path=/")
            await send(message)

        return sending


def serve(app: Any, host: str, port: int, root_path: str, password: str = "") -> None:
    """Serve until a signal; the address is logged when it is open.

    Raises UserError when the address cannot be had.
    """
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port} ({error})", "choose another --host or --port") from error
    logger.info("open http://%s:%d%s/", *listener.getsockname()[:2], root_path)
    config = uvicorn.Config(
        Guard(app, password), log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=3
    )
    _Server(config).run(sockets=[listener])


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Unlike uvicorn's own, not raised again at the end: a page that was told to stop has ended well."""
        self.force_exit = self.should_exit
        self.should_exit = True


def streamlit_app(page: str, environment: dict[str, str], root_path: str) -> Any:
    """A page of Streamlit as an ASGI application; like under `streamlit run`, the environment holds its settings."""
    os.environ.update(environment)
    import streamlit

    app = streamlit.App(Path(__file__).with_name(f"{page}.py"))
    streamlit.config.set_option("server.baseUrlPath", root_path.strip("/"))
    return app
