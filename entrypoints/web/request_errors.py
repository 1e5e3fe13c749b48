"""Why a request got no answer, as a message that the pages show in the language of the visitor."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx2
import openai

REQUEST_ERRORS = (openai.OpenAIError, httpx2.HTTPError)  # the latter when a connection breaks during a stream
_LENGTHS = re.compile(r"the prompt has (?P<tokens>[\w ]+) tokens, the context length is (?P<limit>\d+)")


@dataclass(frozen=True)
class ErrorMessage:
    """The reason for a missing answer: a key of `i18n.TEXTS` and the values of its placeholders."""

    key: str
    values: Mapping[str, object] = field(default_factory=dict)


def describe_error(error: Exception, url: str, has_key: bool) -> ErrorMessage:
    """The message that a visitor sees for a failed request to the API at `url`."""
    if not isinstance(error, openai.APIStatusError):
        is_lost = isinstance(error, openai.APIConnectionError | httpx2.HTTPError)
        return ErrorMessage("unreachable", {"url": url}) if is_lost else _with_detail("failed", str(error))
    body = error.body if isinstance(error.body, dict) else {}
    detail = str(body.get("message") or f"HTTP {error.status_code}, {error.request.url}")
    retry = {"seconds": error.response.headers.get("retry-after", "5")}
    if error.status_code in (401, 403):
        return ErrorMessage("wrong_key" if has_key else "needs_key")
    if error.status_code == 429:
        return ErrorMessage("busy", retry)
    if error.code == "loading":
        return ErrorMessage("loading", retry)
    if error.code == "model_not_found":
        return ErrorMessage("unknown_model")
    if is_too_long(error):
        lengths = _LENGTHS.search(detail)
        return ErrorMessage("too_long_by", lengths.groupdict()) if lengths else _with_detail("too_long", detail)
    return _with_detail("rejected" if error.status_code < 500 else "failed", detail)


def _with_detail(key: str, detail: str) -> ErrorMessage:
    """A message with the text of the server, which is in the language of the server."""
    return ErrorMessage(key, {"detail": detail})


def is_too_long(error: openai.APIStatusError) -> bool:
    """Does the prompt exceed the context length? Servers have different codes and messages for it."""
    text = f"{error.code} {error.type} {error.message}".lower()
    return error.status_code == 400 and "context" in text and any(word in text for word in ("length", "size", "exceed"))
