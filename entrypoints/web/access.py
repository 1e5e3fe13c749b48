"""Who may use a page: names in the Host header, password, routes, sizes; and the security headers of its responses."""

from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from entrypoints.api.allowed_hosts import AllowedHosts
from entrypoints.web.body_limit import LimitedBody
from entrypoints.web.i18n import negotiate_language, translate
from entrypoints.web.sign_in import SignIn, TooManyGuesses
from entrypoints.web.user_sign_in import UserSignIn, with_user

# With this policy a browser fetches nothing from other hosts, whatever a model writes. The libraries need inline
# scripts and styles, and eval.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
SECURITY_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
# Gradio routes that our page does not use: they read and write files, fetch URLs for a visitor, watch other visitors.
BLOCKED_ROUTES = ("file", "upload", "proxy", "stream", "monitoring", "deep_link", "runs", "component_server", "vibe")
MAX_SHOWN_HOST = 100  # characters


class AccessMiddleware:
    """ASGI middleware: /healthz for everyone, known hosts or a sign-in, no file routes, security headers."""

    def __init__(
        self, app: ASGIApp, sign_in: SignIn | UserSignIn | None = None, allowed_hosts: Iterable[str] = ()
    ) -> None:
        self.app = app
        self.sign_in = sign_in  # a web page that reaches this one by DNS rebinding has neither password nor cookie
        self.hosts = None if sign_in else AllowedHosts(allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reject the request, or pass it to the application."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        response, cookie, user = self._own_response(scope, headers), None, None
        if isinstance(self.sign_in, UserSignIn):
            response = response or await self.sign_in.respond(scope, headers, receive)
            user = self.sign_in.user(scope, headers)
        elif not response and self.sign_in and not self.sign_in.has_cookie(scope, headers):
            response = self._sign_in_response(self.sign_in, scope, headers)
            cookie = None if response else self.sign_in.cookie(scope, headers)
        if response and scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif response:
            await response(scope, receive, _with_headers(send, None))
        else:
            if isinstance(self.sign_in, UserSignIn):
                receive = self.sign_in.while_signed_in(scope, headers, receive)
            await self._pass_on(with_user(scope, user), receive, _with_headers(send, cookie))

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
        else:
            await LimitedBody(receive, send).pass_to(self.app, scope)

    def _own_response(self, scope: Scope, headers: Headers) -> Response | None:
        """The health check or a rejection that needs no password; None if the application answers."""
        path, host = scope["path"], headers.get("host", "")
        if path == "/healthz":
            return PlainTextResponse("alive\n")
        if self.hosts and not self.hosts.accept(host):
            return _text(headers, "host_not_allowed", 403, host=repr(host[:MAX_SHOWN_HOST]))
        origin = headers.get("origin")
        if scope["type"] == "websocket" and origin and urlsplit(origin).netloc != host:
            # a script of another site; Streamlit would query an internet service for our address to check it
            return PlainTextResponse("", 403)
        _, is_gradio, route = path.partition("/gradio_api/")
        name = (route if is_gradio else path.rsplit("/", 1)[-1]).split("/")[0].split("=")[0]
        if name in BLOCKED_ROUTES and (is_gradio or "=" in path or name == "monitoring"):
            return PlainTextResponse("not found\n", 404)
        return None

    def _sign_in_response(self, sign_in: SignIn, scope: Scope, headers: Headers) -> PlainTextResponse | None:
        """The request for the password; None if the visitor sent the right one."""
        try:
            if sign_in.has_password(scope, headers):
                return None
        except TooManyGuesses as error:
            response = _text(headers, "too_many_guesses", 429, seconds=error.seconds)
            response.headers["retry-after"] = str(error.seconds)
            return response
        response = _text(headers, "password_required", 401)
        response.headers["www-authenticate"] = 'Basic realm="page", charset="UTF-8"'
        return response


def _text(headers: Headers, key: str, status: int, **values: object) -> PlainTextResponse:
    """A text in the language of the browser."""
    language = negotiate_language(headers.get("accept-language"))
    return PlainTextResponse(translate(language, key, **values) + "\n", status)


def _with_headers(send: Send, cookie: str | None) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY_HEADERS.items():
                headers[name] = value
            if cookie:
                headers.append("set-cookie", cookie)
        await send(message)

    return send_with_headers
