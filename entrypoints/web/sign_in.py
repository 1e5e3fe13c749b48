"""Sign-in to a page with a password: HTTP Basic, a session cookie, and a limit on wrong guesses."""

import base64
import hashlib
import hmac
import ipaddress
import logging
import math
import secrets
import time
import unicodedata
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import Scope

logger = logging.getLogger(__name__)
GUESSES = 5  # wrong passwords of one peer before it must wait
SECONDS_PER_GUESS = 10.0  # after that
TOTAL_GUESSES = 50  # of all peers together; they are reached from ten addresses or more
TOTAL_SECONDS_PER_GUESS = 1.0
PEER_GROUPS = 4096  # peers are counted in so many groups, so that the memory is bounded
IPV6_SUBSCRIBER_BITS = 64  # one subscriber has all addresses of such a prefix


class TooManyGuesses(Exception):
    """The peer must wait for `seconds`; its password was not checked."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"wait {seconds} seconds")
        self.seconds = seconds


class GuessLimit:
    """Limits wrong guesses per peer and in total. A repeated wrong password, as an open tab sends it, counts once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._paid_until = [0.0] * PEER_GROUPS  # time until which the wrong guesses of a group are counted
        self._total_paid_until = 0.0
        self._last_wrong = [b""] * PEER_GROUPS
        self._salt = secrets.token_bytes(16)

    def check(self, peer: str, password: bytes, is_right: Callable[[bytes], bool]) -> bool:
        """Whether the password is right. Raises TooManyGuesses: it was not checked."""
        if self.is_repeated(peer, password):
            return False
        if is_right(password):
            return True
        self.record_wrong(peer, password)
        return False

    def is_repeated(self, peer: str, password: bytes) -> bool:
        """Whether it is the last wrong password of the peer again. Raises TooManyGuesses: it may not be checked."""
        group, now = self._group(peer), self._clock()
        if hmac.compare_digest(self._digest(password), self._last_wrong[group]):
            return True
        wait = max(
            self._paid_until[group] - now - (GUESSES - 1) * SECONDS_PER_GUESS,
            self._total_paid_until - now - (TOTAL_GUESSES - 1) * TOTAL_SECONDS_PER_GUESS,
        )
        if wait > 0:
            raise TooManyGuesses(math.ceil(wait))
        return False

    def record_wrong(self, peer: str, password: bytes) -> None:
        """Count a wrong password."""
        group, now = self._group(peer), self._clock()
        self._last_wrong[group] = self._digest(password)
        self._paid_until[group] = max(self._paid_until[group], now) + SECONDS_PER_GUESS
        self._total_paid_until = max(self._total_paid_until, now) + TOTAL_SECONDS_PER_GUESS
        logger.warning("wrong page password from %s", peer)

    def _group(self, peer: str) -> int:
        return int.from_bytes(self._digest(_network(peer).encode())[:4], "big") % PEER_GROUPS

    def _digest(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, key=self._salt, digest_size=16).digest()


class SignIn:
    """The password of a page. A visitor who entered it gets a cookie, which is valid until the page stops."""

    def __init__(self, password: str, path: str = "/", clock: Callable[[], float] = time.monotonic) -> None:
        self._password = _normalized(password)
        self._token = secrets.token_urlsafe(32)
        self._path = path
        self._limit = GuessLimit(clock)

    def has_cookie(self, scope: Scope, headers: Headers) -> bool:
        """Whether the request has the cookie. Some browsers send no password with a WebSocket request."""
        expected = f"{cookie_name(scope)}={self._token}".encode()
        cookies = [part.strip().encode() for part in headers.get("cookie", "").split(";")]
        return any(hmac.compare_digest(cookie, expected) for cookie in cookies)

    def has_password(self, scope: Scope, headers: Headers) -> bool:
        """Whether the request has the password. Raises TooManyGuesses: it was not checked."""
        password = _basic_password(headers.get("authorization", ""))
        if password is None:
            return False
        return self._limit.check(peer_of(scope), password, lambda given: hmac.compare_digest(given, self._password))

    def cookie(self, scope: Scope, headers: Headers) -> str:
        """The Set-Cookie header of a visitor who entered the password."""
        return session_cookie(scope, headers, self._token, self._path)


def session_cookie(scope: Scope, headers: Headers, token: str, path: str) -> str:
    """A Set-Cookie header that scripts and other sites cannot use; an empty token deletes the cookie."""
    forwarded = headers.get("x-forwarded-proto", "").partition(",")[0].strip().lower()
    is_encrypted = scope["scheme"] in ("https", "wss") or forwarded in ("https", "wss")
    flags = f"HttpOnly; SameSite=Strict; Path={path}{'; Secure' if is_encrypted else ''}"
    return f"{cookie_name(scope)}={token}; {flags}{'' if token else '; Max-Age=0'}"


def cookie_name(scope: Scope) -> str:
    """A name of its own for each port: browsers send the cookies of a host to all its ports."""
    server = scope.get("server")
    return f"page-{server[1] if server else 0}"


def peer_of(scope: Scope) -> str:
    """The address that a request came from; empty if it has none."""
    return scope["client"][0] if scope.get("client") else ""


def _basic_password(authorization: str) -> bytes | None:
    """The password of an Authorization header; None if it has none."""
    scheme, _, credentials = authorization.partition(" ")
    try:
        decoded = base64.b64decode(credentials.strip(), validate=True)
    except ValueError:  # also characters outside ASCII
        return None
    _, colon, password = decoded.partition(b":")
    if scheme.lower() != "basic" or not colon:
        return None
    return _normalized(password.decode("utf-8", "surrogateescape"))


def _normalized(password: str) -> bytes:
    """UTF-8 with composed characters, as RFC 7617 demands: keyboards differ in how they compose them."""
    return unicodedata.normalize("NFC", password).encode("utf-8", "surrogateescape")


def _network(peer: str) -> str:
    """The addresses that one subscriber has: an IPv4 address, or the prefix of an IPv6 address."""
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return peer
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((int(address), IPV6_SUBSCRIBER_BITS), strict=False))
