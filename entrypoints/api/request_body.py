"""Authenticates a client, then reads, parses and validates the body of its request, outside the event loop.

FastAPI itself would read a body before it authenticates the client, and validate it on the event loop.
"""

import functools
import json
import logging
import re
from collections.abc import Awaitable, Callable
from email.message import Message
from typing import Any, TypeVar

import anyio
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema

from entrypoints.api.auth import ApiKey
from entrypoints.api.errors import ApiError
from entrypoints.api.state import ServerState
from entrypoints.errors import UserError

logger = logging.getLogger(__name__)
READ_TIMEOUT_SECONDS = 120.0
# The JSON parser keeps the interpreter from other threads until it ends: 0.06 s for 250,000 decimals or 100,000 fields.
MAX_VALUES = 250_000  # of one body
MAX_CONTAINERS = 100_000  # objects, arrays and fields among them
ESCAPES = (r"\\", r"\"")
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")  # half a character, or one of the two halves of a character
SURROGATE = re.compile("[\ud800-\udfff]")
REFERENCE = "#/components/schemas/{model}"

Model = TypeVar("Model", bound=BaseModel)


async def authenticate(request: Request) -> ApiKey:
    """The API key of the request, counted against its rate limit; raises ApiError (401) or RequestRejected (429)."""
    state: ServerState = request.app.state.server
    try:
        state.keys.refresh()
    except UserError as error:  # for example a half-written file: the keys read before stay valid
        logger.error("%s", error)
    key = state.keys.find(request.headers.get("authorization"))
    if key is None:
        raise ApiError(401, "a valid API key is required: Authorization: Bearer KEY", code="invalid_api_key")
    request.scope["state"]["key"] = key.name
    state.admission.check_rate_limit(key)
    return key


def body_of(model: type[Model]) -> Callable[..., Awaitable[Model]]:
    """A dependency that returns the body of an authenticated request as this model.

    Raises RequestValidationError, or ApiError (408) when the body does not arrive in time.
    """

    async def read(request: Request, key: ApiKey = Depends(authenticate)) -> Model:
        with anyio.move_on_after(READ_TIMEOUT_SECONDS) as timeout:
            content = await request.body()
        if timeout.cancelled_caught:
            raise ApiError(408, f"the body did not arrive within {READ_TIMEOUT_SECONDS:.0f} s", code="body_timeout")
        state: ServerState = request.app.state.server
        content_type = request.headers.get("content-type", "")
        return await anyio.to_thread.run_sync(_validate, model, content, content_type, limiter=state.validations)

    return read


def describe_body(model: type[BaseModel]) -> dict[str, Any]:
    """The part of an operation in /openapi.json that describes its body."""
    reference = {"$ref": REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def describe_models(app: FastAPI, models: list[type[BaseModel]]) -> None:
    """Add the models that `describe_body` refers to to /openapi.json."""
    base = app.openapi

    @functools.cache  # clients without a key may request the document
    def openapi() -> dict[str, Any]:
        document = base()
        _, schemas = models_json_schema([(model, "validation") for model in models], ref_template=REFERENCE)
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        return document

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI's documented way to extend the document


def _is_json(content_type: str) -> bool:
    """Whether the content type is JSON. Web pages may send other types to any address without permission (CORS)."""
    message = Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


def _validate(model: type[Model], content: bytes, content_type: str) -> Model:
    if not _is_json(content_type):
        given = f"is {content_type[:80]!r}" if content_type else "is missing"
        raise _invalid("content_type", f"the Content-Type {given}; it must be application/json")
    return parse_body(model, content)


def parse_body(model: type[Model], content: bytes) -> Model:
    """The JSON of a body as this model. Raises RequestValidationError that names the field at fault."""
    body = _parse(content)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        located = [{**problem, "loc": ("body", *problem["loc"])} for problem in problems]
        raise RequestValidationError(located, body=body) from None


def _parse(content: bytes) -> Any:
    """The JSON of a body. Raises RequestValidationError that says what the body is instead."""
    encoding = json.detect_encoding(content)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        guess = ", it seems to be GBK" if _is_json_in(content, "gb18030") else ""
        message = f"the body is not UTF-8 (byte {error.start}){guess}; encode it as UTF-8"
        raise _invalid("json_invalid", message) from None
    _check_value_count(text)
    try:
        body = json.loads(text)
    except json.JSONDecodeError as error:
        message = f"the body is not JSON: {error.msg} in line {error.lineno}, column {error.colno}"
        raise _invalid("json_invalid", message) from None
    except (ValueError, RecursionError):  # a number of thousands of digits, or nested too deeply
        raise _invalid("json_invalid", "the body is not JSON that this server can read") from None
    if SURROGATE_ESCAPE.search(text) and not _is_encodable(body) and (path := _path_of_surrogate(body)) is not None:
        message = "contains half a character (a lone surrogate); it cannot be encoded"
        raise RequestValidationError([{"type": "string_unicode", "loc": ("body", *path), "msg": message}], body=body)
    return body


def _check_value_count(text: str) -> None:
    """Raises RequestValidationError for too many values; counts separators, which is much faster than to parse."""
    if _has_few_values(text):
        return
    for escape in ESCAPES:
        text = text.replace(escape, "")
    # also bounds the pieces; an array of strings has two quotes for each
    if text.count('"') > 2 * MAX_VALUES or not _has_few_values("".join(text.split('"')[::2])):
        message = f"the body has more than {MAX_VALUES:,} values, or {MAX_CONTAINERS:,} objects, arrays and fields"
        raise _invalid("too_long", message)


def _has_few_values(text: str) -> bool:
    return text.count(",") < MAX_VALUES and sum(map(text.count, "[{:")) <= MAX_CONTAINERS


def _is_json_in(content: bytes, encoding: str) -> bool:
    try:
        json.loads(content.decode(encoding))
    except (ValueError, RecursionError):
        return False
    return True


def _is_encodable(body: object) -> bool:
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


def _path_of_surrogate(body: object) -> tuple[str | int, ...] | None:
    """Where in a body a string or a key cannot be encoded; None: nowhere."""
    stack: list[tuple[tuple[str | int, ...], object]] = [((), body)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, str) and SURROGATE.search(node):
            return path
        if isinstance(node, dict):
            if any(SURROGATE.search(key) for key in node):
                return path
            stack += [((*path, key), value) for key, value in node.items()]
        elif isinstance(node, list):
            stack += [((*path, index), value) for index, value in enumerate(node)]
    return None


def _invalid(kind: str, message: str) -> RequestValidationError:
    return RequestValidationError([{"type": kind, "loc": ("body",), "msg": message}])
