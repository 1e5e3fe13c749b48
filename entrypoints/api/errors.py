"""Errors in OpenAI's shape: message, type, the field at fault, and a code that programs can read."""

from collections.abc import Mapping

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from entrypoints.errors import BrokenModel, UserError


class ApiError(HTTPException):  # the one kind that FastAPI lets pass while it reads a body
    """A request that cannot be served as it is; `param` names the field."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message)
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


def of_failure(error: Exception) -> tuple[int, dict]:
    """Status and JSON for what was raised while answering: 400 with the reason if an engine refuses, else 500."""
    if isinstance(error, ApiError):
        return error.status_code, body(error.status_code, error.detail, error.param, error.code)
    if isinstance(error, UserError) and not isinstance(error, BrokenModel):
        return 400, body(400, str(error), code="invalid_request")
    return 500, body(500, "the engine failed", code="engine_error")


def of_validation(error: RequestValidationError) -> JSONResponse:
    """400 that names the field at fault, and how many more problems there are."""
    problems = [(_path(problem, error.body), problem) for problem in error.errors()]
    path, worst = max(problems, key=lambda problem: len(problem[0]))  # of a union's types, the one that came furthest
    field = ".".join(path) or None
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return response(400, f"{field or 'body'}: {worst['msg']}{more}", field, worst["type"])


def _path(problem: dict, body: object) -> list[str]:
    """The keys and places of the problem in the body, without what Pydantic puts between: names of a union's types."""
    found, here = [], body
    for part in problem["loc"][1:]:
        if (isinstance(here, dict) and part in here) or (isinstance(here, list) and isinstance(part, int)):
            found.append(str(part))
            here = here[part]
    if problem["type"] == "missing":
        found.append(str(problem["loc"][-1]))
    return found
