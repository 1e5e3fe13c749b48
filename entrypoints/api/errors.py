"""Errors in OpenAI's shape: message, type, the field at fault, and a code that programs can read."""

from collections.abc import Mapping

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse


class ApiError(Exception):
    """A request that cannot be served as it is; `param` names the field."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


def body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict:
    """The JSON of an error."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The response of an error."""
    return JSONResponse(body(status, message, param, code), status, headers=dict(headers or {}))


def of_validation(error: RequestValidationError) -> JSONResponse:
    """400 that names the first field at fault, and how many more there are."""
    problems = error.errors()
    first = problems[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    field = ".".join(path) or None
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return response(400, f"{field or 'body'}: {first['msg']}{more}", field, first["type"])
