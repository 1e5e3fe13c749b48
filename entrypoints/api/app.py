"""The routes: OpenAI's chat, completions and models, and what an orchestrator asks for."""

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from entrypoints.api import errors
from entrypoints.api.answers import Choices, chat_events, chat_result, completion_events, completion_result
from entrypoints.api.auth import Key
from entrypoints.api.errors import ApiError
from entrypoints.api.limits import Refused
from entrypoints.api.middleware import RequestFrame
from entrypoints.api.openai_schema import ChatRequest, CompletionRequest, TokenizeRequest
from entrypoints.api.requests import chat_tasks, completion_tasks, token_ids
from entrypoints.api.server import Serving
from entrypoints.api.streaming import EventStream, while_wanted
from entrypoints.errors import UserError

logger = logging.getLogger(__name__)
CREATED = int(time.time())


def create_app(serving: Serving) -> FastAPI:
    """The application of one server. No page is served and nothing is fetched from outside, /openapi.json included."""
    app = FastAPI(title="ChatGLM3 server", docs_url=None, redoc_url=None, version="1")
    app.state.serving = serving
    _add_errors(app)
    _add_model_routes(app, serving)
    _add_answer_routes(app, serving)
    _add_health_routes(app, serving)
    app.add_middleware(RequestFrame, serving=serving)
    if serving.options.cors_origins:  # around the frame, so that a page can also read what the frame itself answers
        app.add_middleware(
            CORSMiddleware,
            allow_origins=serving.options.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


async def caller(request: Request) -> Key:
    """The key of the request, which is counted against its rate; raises ApiError 401 or Refused."""
    serving = request.app.state.serving
    try:
        serving.keys.refresh()
    except UserError as error:  # a half-written file: the keys read before go on to count
        logger.error("%s", error)
    key = serving.keys.find(request.headers.get("authorization"))
    if key is None:
        raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
    request.scope["state"]["key"] = key.name
    serving.admission.count(key)
    return key


def _add_model_routes(app: FastAPI, serving: Serving) -> None:
    @app.get("/v1/models")
    async def models(key: Key = Depends(caller)) -> dict:
        """The model and its adapters, with the window in tokens."""
        _require_engine(serving)
        return {"object": "list", "data": [_model(serving, name) for name in serving.models()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, key: Key = Depends(caller)) -> dict:
        """One of them."""
        _require_engine(serving)
        if name not in serving.models():
            raise ApiError(404, f"there is no model {name!r}", "model", "model_not_found")
        return _model(serving, name)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest, key: Key = Depends(caller)) -> dict:
        """Ids of a conversation's prompt, or of a plain text."""
        _require_engine(serving)
        ids = await anyio.to_thread.run_sync(token_ids, serving, body)
        return {"tokens": ids, "count": len(ids), "max_model_len": serving.engine.window}


def _add_answer_routes(app: FastAPI, serving: Serving) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request, key: Key = Depends(caller)) -> Response:
        """Answer a conversation."""
        _require_engine(serving)
        await _log_prompt(serving, request)
        tasks = await anyio.to_thread.run_sync(chat_tasks, serving, body)  # megabytes of text take a second to encode
        choices = Choices(serving, tasks, body.n or 1, body.model, "chatcmpl")
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return _stream(serving, key, choices, chat_events(choices, usage, bool(body.logprobs)))
        return await _collect(serving, key, request, choices, lambda: chat_result(choices, bool(body.logprobs)))

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request, key: Key = Depends(caller)) -> Response:
        """Continue a text."""
        _require_engine(serving)
        await _log_prompt(serving, request)
        tasks = await anyio.to_thread.run_sync(completion_tasks, serving, body)
        choices = Choices(serving, tasks, body.n or 1, body.model, "cmpl")
        logprobs = body.logprobs is not None
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return _stream(serving, key, choices, completion_events(choices, usage, logprobs))
        return await _collect(serving, key, request, choices, lambda: completion_result(choices, logprobs))


def _add_health_routes(app: FastAPI, serving: Serving) -> None:
    @app.get("/healthz")
    async def alive() -> JSONResponse:
        """200 while the process can work; 503 when it should be replaced."""
        return JSONResponse({"status": serving.broken or "alive"}, 503 if serving.broken else 200)

    @app.get("/readyz")
    async def ready() -> JSONResponse:
        """200 when the weights are loaded and requests may come."""
        if serving.ready:
            return JSONResponse(
                {"status": "ready", "model": serving.options.model, "adapters": [*serving.engine.adapters]}
            )
        status = serving.broken or ("draining" if serving.admission.draining else "loading")
        return JSONResponse({"status": status}, 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        """Prometheus metrics."""
        return PlainTextResponse(serving.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _stream(serving: Serving, key: Key, choices: Choices, events: AsyncIterator[dict]) -> EventStream:
    with contextlib.ExitStack() as held:
        choices.ticket = held.enter_context(serving.admission.admit(key, len(choices.tasks)))
        # the stream gives the room back at its end
        return EventStream(events, held.pop_all(), serving.admission.over)


async def _collect(
    serving: Serving, key: Key, request: Request, choices: Choices, work: Callable[[], Awaitable[dict]]
) -> Response:
    with serving.admission.admit(key, len(choices.tasks)) as choices.ticket:
        answer = await while_wanted(work(), request.receive, serving.admission.over)
    return JSONResponse(answer) if answer is not None else Response(status_code=499)


async def _log_prompt(serving: Serving, request: Request) -> None:
    if serving.options.log_prompts:
        text = (await request.body()).decode("utf-8", "replace")  # kept by the request since it was parsed
        logger.info("request %s asks: %r", request.scope["state"]["request_id"], text)


def _require_engine(serving: Serving) -> None:
    if serving.engine is None:
        raise Refused(503, "loading", "the model is loading", 5)
    if serving.broken:
        raise Refused(503, "broken", serving.broken, 30)


def _model(serving: Serving, name: str) -> dict:
    adapter = serving.models()[name]
    return {
        "id": name,
        "object": "model",
        "created": CREATED,
        "owned_by": "local",
        "max_model_len": serving.engine.window,
        "parent": serving.options.model if adapter else None,
    }


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return errors.of_validation(error)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        headers = {"www-authenticate": "Bearer"} if error.status_code == 401 else {}
        return errors.response(error.status_code, error.detail, error.param, error.code, headers)

    @app.exception_handler(Refused)
    async def busy(request: Request, error: Refused) -> JSONResponse:
        return errors.response(
            error.status, str(error), code=error.code, headers={"retry-after": str(error.retry_after)}
        )

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return errors.response(error.status_code, str(error.detail), headers=error.headers)
