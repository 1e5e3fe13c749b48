"""Sign-in of users with names: a form, and sessions in memory, which a restart of the page ends."""

import asyncio
import functools
import hashlib
import html
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import Message, Receive, Scope

from entrypoints.web.i18n import negotiate_language, translate
from entrypoints.web.sign_in import GuessLimit, TooManyGuesses, cookie_name, peer_of, session_cookie
from entrypoints.web.users import PageUser, UserFile

logger = logging.getLogger(__name__)
USER_HEADER = "x-page-user"  # PROOF:NAME of the signed-in user, percent-encoded; set by the page itself
PROOF = secrets.token_urlsafe(16)  # `streamlit run` does not remove the header that a client sent
IDLE_SECONDS = 12 * 3600.0  # a session that is not used for so long has ended
MAX_SESSION_SECONDS = 7 * 24 * 3600.0
MAX_SESSIONS = 10_000  # further ones end the oldest
MAX_FORM_BYTES = 8192
FONT = "16px/1.5 system-ui, 'Noto Sans CJK SC', 'PingFang SC', 'Microsoft YaHei', sans-serif"
PAGE = """<!doctype html>
<html lang="{language}"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="same-origin">
<style>
:root {{color-scheme: light dark; font: {font}}}
body {{margin: 0; min-height: 100vh; display: grid; place-items: center}}
form {{width: min(20rem, calc(100vw - 3rem)); display: grid; gap: .75rem}}
h1 {{font-size: 1.4rem; margin: 0 0 .5rem}}
label {{display: grid; gap: .25rem}}
input, button {{font: inherit; padding: .5rem .75rem; border: 1px solid #808080; border-radius: .5rem}}
button {{background: #4f46e5; color: #fff; border-color: #4f46e5; cursor: pointer; margin-top: .5rem}}
[role=alert] {{color: light-dark(#b00020, #ff8a95); margin: 0}}
</style></head><body><main><form method="post" action="{action}">
<h1>{title}</h1>{alert}
<label>{user_name}
<input name="name" value="{name}" autocomplete="username" autocapitalize="none" required {focus_name}></label>
<label>{password}
<input name="password" type="password" autocomplete="current-password" required {focus_password}></label>
<button>{title}</button></form></main></body></html>
"""


@dataclass
class _Session:
    user: str
    password_hash: str  # at sign-in; a new password ends the session
    started: float
    used: float


class UserSignIn:
    """The users of a page, their sessions, and the routes `/sign-in` and `/sign-out`."""

    def __init__(self, users: UserFile, root_path: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self._users = users
        self._root = root_path
        self._clock = clock
        self._limit = GuessLimit(clock)
        self._sessions: dict[bytes, _Session] = {}  # by the hash of the cookie, the oldest first
        self._one_guess = asyncio.Lock()  # one hash at a time: each takes a CPU and 32 MiB

    def user(self, scope: Scope, headers: Headers) -> PageUser | None:
        """The user of a request by its cookie; None if nobody is signed in."""
        token = _token(scope, headers)
        session = self._sessions.get(_digest(token)) if token else None
        if session is None:
            return None
        now, user = self._clock(), self._users.find(session.user)
        is_over = now - session.used > IDLE_SECONDS or now - session.started > MAX_SESSION_SECONDS
        if is_over or user is None or user.password_hash != session.password_hash:
            del self._sessions[_digest(token)]
            return None
        session.used = now
        return user

    async def respond(self, scope: Scope, headers: Headers, receive: Receive) -> Response | None:
        """The response to a visitor who is not signed in, or to the two routes; None: the page may respond."""
        path = scope["path"].removeprefix(self._root)
        if scope["type"] == "websocket":
            return None if self.user(scope, headers) else PlainTextResponse("", 403)
        if path == "/sign-out":
            return self._sign_out(scope, headers)
        if path == "/sign-in" and scope["method"] == "POST":
            return await self._sign_in(scope, headers, receive)
        if self.user(scope, headers):
            return RedirectResponse(f"{self._root}/", 303) if path == "/sign-in" else None
        if "text/html" in headers.get("accept", "") and scope["method"] in ("GET", "HEAD"):
            return self._form(headers, 401)
        return PlainTextResponse(_text(headers, "password_required") + "\n", 401)

    def while_signed_in(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """The messages of a WebSocket as long as its user is signed in, then its end; other requests unchanged."""
        if scope["type"] != "websocket":
            return receive

        async def checked() -> Message:
            message = await receive()
            if message["type"] == "websocket.receive" and self.user(scope, headers) is None:
                return {"type": "websocket.disconnect", "code": 1008}
            return message

        return checked

    async def _sign_in(self, scope: Scope, headers: Headers, receive: Receive) -> Response:
        origin = headers.get("origin")
        if origin and urlsplit(origin).netloc != headers.get("host", ""):
            return PlainTextResponse("", 403)  # a form of another site; with `no-referrer` ours would send `null` too
        form = await _read_form(receive)
        if form is None:
            return PlainTextResponse("", 413)
        name, password = form.get("name", ""), form.get("password", "")
        try:
            user = await self._check(peer_of(scope), name, password)
        except TooManyGuesses as error:
            response = self._form(headers, 429, name, _text(headers, "too_many_guesses", seconds=error.seconds))
            response.headers["retry-after"] = f"{error.seconds}"
            return response
        if user is None:
            return self._form(headers, 401, name, _text(headers, "wrong_password"))
        redirect = RedirectResponse(f"{self._root}/", 303)
        redirect.headers["set-cookie"] = session_cookie(scope, headers, self._start(user), self._root or "/")
        return redirect

    async def _check(self, peer: str, name: str, password: str) -> PageUser | None:
        """The user of this name and password. Raises TooManyGuesses."""
        guess = f"{name}\0{password}".encode("utf-8", "surrogateescape")
        async with self._one_guess:
            if self._limit.is_repeated(peer, guess):
                return None
            if await asyncio.to_thread(self._users.is_password, name, password):
                return self._users.find(name)
            self._limit.record_wrong(peer, guess)
            return None

    def _start(self, user: PageUser) -> str:
        """Start a session; returns its random token."""
        token, now = secrets.token_urlsafe(32), self._clock()
        while len(self._sessions) >= MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        self._sessions[_digest(token)] = _Session(user.name, user.password_hash, now, now)
        logger.info("user %s signed in", user.name)
        return token

    def _sign_out(self, scope: Scope, headers: Headers) -> Response:
        """End the session. A link suffices: another site cannot send the cookie, which is SameSite=Strict."""
        self._sessions.pop(_digest(_token(scope, headers)), None)
        response = self._form(headers, 200)
        response.headers["set-cookie"] = session_cookie(scope, headers, "", self._root or "/")
        return response

    def _form(self, headers: Headers, status: int, name: str = "", error: str = "") -> HTMLResponse:
        language = negotiate_language(headers.get("accept-language"))
        texts = {key: html.escape(translate(language, key)) for key in ("user_name", "password")}
        alert = f'<p role="alert">{html.escape(error)}</p>' if error else ""
        page = PAGE.format(
            language=language,
            font=FONT,
            title=translate(language, "sign_in"),
            action=html.escape(f"{self._root}/sign-in"),
            alert=alert,
            name=html.escape(name.encode("utf-8", "replace").decode()),
            focus_name="" if name else "autofocus",
            focus_password="autofocus" if name else "",
            **texts,
        )
        return HTMLResponse(page, status, {"cache-control": "no-store"})


def with_user(scope: Scope, user: PageUser | None) -> Scope:
    """The request as the page gets it: with the name of the signed-in user, and without one that a client sent."""
    headers = [(name, value) for name, value in scope["headers"] if name.lower() != USER_HEADER.encode()]
    if user:
        headers.append((USER_HEADER.encode(), f"{PROOF}:{quote(user.name, safe='')}".encode()))
    return {**scope, "headers": headers}


def user_name(headers: Mapping[str, str]) -> str:
    """The signed-in user of a request that the page gets; empty if the page has no users."""
    proof, _, name = headers.get(USER_HEADER, "").partition(":")
    return unquote(name) if secrets.compare_digest(proof.encode(), PROOF.encode()) else ""


def signed_in_user(headers: Mapping[str, str], users_file: str) -> PageUser | None:
    """The user with the API key that the page uses for them; None if the page has no users. users_file: of Settings."""
    name = user_name(headers)
    return find_user(users_file, name) if name and users_file else None


def find_user(users_file: str, name: str) -> PageUser | None:
    """The user of this name as the file has it now."""
    return _user_file(users_file).find(name)


@functools.lru_cache(4)
def _user_file(file: str) -> UserFile:
    return UserFile(Path(file))


def _token(scope: Scope, headers: Headers) -> str:
    wanted = cookie_name(scope)
    pairs = (part.strip().partition("=") for part in headers.get("cookie", "").split(";"))
    return next((value for name, _, value in pairs if name == wanted), "")


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


async def _read_form(receive: Receive) -> dict[str, str] | None:
    """The fields of a form, the first of each name; None for one above MAX_FORM_BYTES."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_FORM_BYTES:
            return None
    fields = parse_qs(body.decode("ascii", "replace"), max_num_fields=10) if body.count(b"&") < 10 else {}
    return {name: values[0] for name, values in fields.items()}


def _text(headers: Headers, key: str, **values: object) -> str:
    return translate(negotiate_language(headers.get("accept-language")), key, **values)
