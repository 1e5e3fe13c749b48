"""The routes: OpenAI's chat completions, completions and models; tokenization, health, readiness and metrics."""

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Annotated, Any, TypeVar

import anyio
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from entrypoints.api import errors
from entrypoints.api.admission import RequestRejected
from entrypoints.api.auth import ANONYMOUS, ApiKey
from entrypoints.api.embeddings import EmbeddingsRequest, embed
from entrypoints.api.errors import ApiError, ErrorReply, JSONResponse
from entrypoints.api.generation import GenerationTask
from entrypoints.api.middleware import STATUS_CLIENT_CLOSED_REQUEST, AllowedHostsMiddleware, RequestContextMiddleware
from entrypoints.api.openai_schema import ChatRequest, CompletionRequest, TokenizeRequest
from entrypoints.api.request_body import authenticate, body_of, describe_body, describe_models
from entrypoints.api.requests import build_chat_tasks, build_completion_tasks, tokenize_request
from entrypoints.api.responses import CompletionRun, chat_events, chat_result, completion_events, completion_result
from entrypoints.api.responses_output import NamedEvents, ResponseRun
from entrypoints.api.responses_request import build_response_tasks
from entrypoints.api.responses_schema import ResponsesRequest
from entrypoints.api.state import ServerState
from entrypoints.api.streaming import DataEvents, EventFormat, EventStream, run_until_disconnect

logger = logging.getLogger(__name__)
Body = TypeVar("Body")
Built = TypeVar("Built")
CREATED = int(time.time())
COMPLETION_EVENTS = DataEvents()


def create_app(state: ServerState) -> FastAPI:
    """The application of one server. It serves no web page and needs no external resource for /openapi.json."""
    app = FastAPI(title="ChatGLM3 server", docs_url=None, redoc_url=None, version="1")
    app.state.server = state
    _add_error_handlers(app)
    _add_model_routes(app, state)
    _add_completion_routes(app, state)
    _add_responses_route(app, state)
    _add_embeddings_route(app, state)
    _add_health_routes(app, state)
    describe_models(app, [ChatRequest, CompletionRequest, EmbeddingsRequest, ResponsesRequest, TokenizeRequest])
    if state.options.allowed_hosts is not None:
        app.add_middleware(AllowedHostsMiddleware, names=state.options.allowed_hosts)
    app.add_middleware(RequestContextMiddleware, state=state)
    if state.options.cors_origins:  # the outermost layer, so that a web page can also read errors of the middleware
        app.add_middleware(
            CORSMiddleware,
            allow_origins=state.options.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


def _add_model_routes(app: FastAPI, state: ServerState) -> None:
    @app.get("/v1/models")
    async def models(key: ApiKey = Depends(authenticate)) -> dict[str, Any]:
        """List the model, its adapters and the embedding model, each with its context length in tokens."""
        return {"object": "list", "data": [_model(state, name) for name in _served(state)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, key: ApiKey = Depends(authenticate)) -> dict[str, Any]:
        """Describe one model or adapter."""
        return _model(state, name)

    @app.post("/tokenize", openapi_extra=describe_body(TokenizeRequest))
    async def tokenize(body: Annotated[TokenizeRequest, Depends(body_of(TokenizeRequest))]) -> Response:
        """Token ids of a conversation's prompt, or of a text."""
        content = await anyio.to_thread.run_sync(tokenize_request, state, body)
        return Response(content, media_type="application/json")


def _add_completion_routes(app: FastAPI, state: ServerState) -> None:
    @app.post("/v1/chat/completions", response_model=None, openapi_extra=describe_body(ChatRequest))
    async def chat(
        request: Request,
        body: Annotated[ChatRequest, Depends(body_of(ChatRequest))],
        key: ApiKey = Depends(authenticate),
    ) -> Response:
        """Answer a conversation."""
        tasks = await _build(state, request, build_chat_tasks, body)
        run = _completion_run(state, body, tasks, "chatcmpl")
        if body.stream:
            return _stream(key, run, chat_events(run))
        return await _respond(key, run, request, chat_result)

    @app.post("/v1/completions", response_model=None, openapi_extra=describe_body(CompletionRequest))
    async def completions(
        request: Request,
        body: Annotated[CompletionRequest, Depends(body_of(CompletionRequest))],
        key: ApiKey = Depends(authenticate),
    ) -> Response:
        """Continue a text."""
        tasks = await _build(state, request, build_completion_tasks, body)
        run = _completion_run(state, body, tasks, "cmpl")
        if body.stream:
            return _stream(key, run, completion_events(run))
        return await _respond(key, run, request, completion_result)


def _add_responses_route(app: FastAPI, state: ServerState) -> None:
    @app.post("/v1/responses", response_model=None, openapi_extra=describe_body(ResponsesRequest))
    async def responses(
        request: Request,
        body: Annotated[ResponsesRequest, Depends(body_of(ResponsesRequest))],
        key: ApiKey = Depends(authenticate),
    ) -> Response:
        """Answer a conversation of input items."""
        chat, tasks = await _build(state, request, build_response_tasks, body)
        run = _completion_run(state, chat, tasks, "resp")
        response = ResponseRun(body, run)
        if body.stream:
            return _stream(key, run, response.events(), NamedEvents(response))
        return await _respond(key, run, request, lambda _: response.result())


def _add_embeddings_route(app: FastAPI, state: ServerState) -> None:
    @app.post("/v1/embeddings", response_model=None, openapi_extra=describe_body(EmbeddingsRequest))
    async def embeddings(
        request: Request,
        body: Annotated[EmbeddingsRequest, Depends(body_of(EmbeddingsRequest))],
        key: ApiKey = Depends(authenticate),
    ) -> Response:
        """Vectors of texts."""
        state.require_embedder()
        await _log_prompt(state, request)
        admission, queue = state.admission, state.embedding_queue
        with admission.admit(key, 0), queue.admit(ANONYMOUS, 1) as admitted:

            async def work() -> bytes:
                reply = await embed(state, body, key, admitted)
                return await anyio.to_thread.run_sync(reply.body)

            content = await run_until_disconnect(work(), request.receive, admission.drain_expired)
        if content is None:
            return Response(status_code=STATUS_CLIENT_CLOSED_REQUEST)
        return Response(content, media_type="application/json")


def _add_health_routes(app: FastAPI, state: ServerState) -> None:
    @app.get("/healthz")
    async def alive() -> JSONResponse:
        """Liveness: 200 while the process works; 503 when it must be restarted."""
        return JSONResponse({"status": state.fatal_error or "alive"}, 503 if state.fatal_error else 200)

    @app.get("/readyz")
    async def ready() -> JSONResponse:
        """Readiness: 200 when the weights are loaded and requests are accepted."""
        if state.ready:
            adapters = [*state.engine.adapters] if state.engine else []
            models = {"model": state.options.model, "adapters": adapters, "embeddings": state.options.embeddings}
            return JSONResponse({"status": "ready", **models})
        status = state.fatal_error or ("draining" if state.admission.draining else "loading")
        return JSONResponse({"status": status}, 503)

    @app.get("/metrics", dependencies=[Depends(authenticate)] if state.options.metrics_need_key else [])
    async def metrics() -> PlainTextResponse:
        """Prometheus metrics."""
        return PlainTextResponse(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _build(
    state: ServerState, request: Request, build: Callable[[ServerState, Body], Built], body: Body
) -> Built:
    """What the engine has to do for a request; raises RequestRejected or ApiError if it cannot."""
    state.require_engine()
    await _log_prompt(state, request)
    return await anyio.to_thread.run_sync(build, state, body)  # megabytes of text take a second to encode


def _completion_run(
    state: ServerState, body: ChatRequest | CompletionRequest, tasks: list[GenerationTask], id_prefix: str
) -> CompletionRun:
    return CompletionRun(
        state=state,
        tasks=tasks,
        model=body.model or state.options.model or "",
        n=body.n or 1,
        id_prefix=id_prefix,
        logprobs=body.sampling().top_logprobs is not None,
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
    )


def _stream(
    key: ApiKey,
    run: CompletionRun,
    events: AsyncGenerator[dict[str, Any], None],
    event_format: EventFormat = COMPLETION_EVENTS,
) -> EventStream:
    admission = run.state.admission
    with contextlib.ExitStack() as resources:
        run.key = key.name
        run.admitted = resources.enter_context(admission.admit(key, len(run.tasks)))
        resources.callback(run.count_usage, "aborted")  # if nothing was generated
        # the stream releases the capacity when it ends
        return EventStream(events, resources.pop_all(), admission.drain_expired, event_format)


async def _respond(
    key: ApiKey, run: CompletionRun, request: Request, result: Callable[[CompletionRun], Awaitable[dict[str, Any]]]
) -> Response:
    admission = run.state.admission
    run.key = key.name
    with admission.admit(key, len(run.tasks)) as run.admitted:
        try:
            body = await run_until_disconnect(result(run), request.receive, admission.drain_expired)
        finally:
            run.count_usage("aborted")  # if nothing was generated
    return Response(status_code=STATUS_CLIENT_CLOSED_REQUEST) if body is None else JSONResponse(body)


async def _log_prompt(state: ServerState, request: Request) -> None:
    if state.options.log_prompts:
        text = (await request.body()).decode("utf-8", "replace")  # Starlette caches the body
        logger.info("request %s body: %r", request.scope["state"]["request_id"], text)


def _served(state: ServerState) -> list[str]:
    """Names of all models in /v1/models."""
    return [*state.models(), *([state.options.embeddings] if state.options.embeddings else [])]


def _model(state: ServerState, name: str) -> dict[str, Any]:
    """The entry of a model or adapter in /v1/models; raises ApiError (404) if it is unknown."""
    if state.options.model is not None and name != state.options.embeddings:
        state.require_engine()  # its adapters are known when it is loaded
    if name not in _served(state):
        raise state.model_not_found(name, _served(state))
    if name == state.options.embeddings:
        length, parent = state.require_embedder()[1].max_tokens, None
    else:
        length = state.require_engine().context_length
        parent = state.options.model if state.models()[name] else None
    return {
        "id": name,
        "object": "model",
        "created": CREATED,
        "owned_by": "local",
        "max_model_len": length,
        "parent": parent,
    }


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid_body(request: Request, error: RequestValidationError) -> JSONResponse:
        return errors.from_validation_error(error).response()

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        headers = {"www-authenticate": "Bearer"} if error.status_code == 401 else {}
        return errors.from_exception(error).response(headers)

    @app.exception_handler(RequestRejected)
    async def rejected(request: Request, error: RequestRejected) -> JSONResponse:
        reply = ErrorReply(error.status, str(error), code=error.code)
        headers = {"retry-after": str(error.retry_after)}
        if error.code == "insufficient_quota":
            headers["x-should-retry"] = "false"  # OpenAI's clients would repeat the request at once
        return reply.response(headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is no {request.url.path[:100]}; /v1/chat/completions and more are in /openapi.json"
        return ErrorReply(error.status_code, message).response(error.headers)
