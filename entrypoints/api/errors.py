"""Errors in OpenAI's format: message, type, the field at fault, and a machine-readable code."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import responses
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from entrypoints.engines.base import JsonSchemaError
from entrypoints.errors import ModelError, UserError

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class JSONResponse(responses.JSONResponse):
    """JSON that says it is UTF-8: PowerShell 5 takes it for ISO-8859-1 otherwise."""

    media_type = "application/json; charset=utf-8"


class ApiError(HTTPException):  # FastAPI lets only HTTPException pass while it reads a body
    """A request that cannot be served as it is; `param` names the field."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message)
        self.param = param
        self.code = code


@dataclass(frozen=True)
class ErrorReply:
    """HTTP status and error object of a failed request."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None

    def body(self) -> dict[str, Any]:
        """The JSON of the error."""
        error_type = ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": error_type, "param": self.param, "code": self.code}}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """The HTTP response of the error."""
        return JSONResponse(self.body(), self.status, headers=dict(headers or {}))


def from_exception(error: Exception) -> ErrorReply:
    """The reply for an exception raised while a request ran: 400 with the reason if an engine rejects it, else 500."""
    if isinstance(error, ApiError):
        return ErrorReply(error.status_code, error.detail, error.param, error.code)
    if isinstance(error, UserError) and not isinstance(error, ModelError):
        param = "response_format" if isinstance(error, JsonSchemaError) else None
        return ErrorReply(400, str(error), param, "invalid_request")
    return ErrorReply(500, "the engine failed", code="engine_error")  # details stay in the log


def from_validation_error(error: RequestValidationError) -> ErrorReply:
    """A 400 that names one field at fault and the number of further problems."""
    problems = [(_path(problem, error.body), problem) for problem in error.errors()]
    # a union reports one problem per member type: the longest path belongs to the type that the value resembles most
    path, deepest = max(problems, key=lambda problem: len(problem[0]))
    field = ".".join(path) or None
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return ErrorReply(400, f"{field or 'body'}: {deepest['msg']}{more}", field, deepest["type"])


def _path(problem: Mapping[str, Any], body: object) -> list[str]:
    """Keys and indexes of a problem in the body, without the names of union members that Pydantic inserts."""
    path: list[str] = []
    node: Any = body
    for part in problem["loc"][1:]:
        if (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int)):
            path.append(str(part))
            node = node[part]
    if problem["type"] == "missing":
        path.append(str(problem["loc"][-1]))
    return path
