"""POST /v1/embeddings: the vectors of texts, computed by the second model of the server."""

import asyncio
import base64
import json
import struct
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from entrypoints.api.admission import AdmittedRequest
from entrypoints.api.auth import ApiKey
from entrypoints.api.errors import ApiError
from entrypoints.api.openai_schema import TokenIds, prompt_kind
from entrypoints.api.request_fields import Integer, RequestModel
from entrypoints.api.state import EMBEDDING_SLOTS, ServerState
from entrypoints.api.usage import UsageRecord
from entrypoints.engines.llamacpp.embeddings import Embedding, EmbeddingEngine, InputTooLong
from entrypoints.errors import UserError

MAX_INPUTS = 2048

Input = tuple[str, str | list[int]]  # name of the field, and a text or token ids

Texts = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]
IdLists = Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]
EmbeddingInput = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[Texts, Tag("texts")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[IdLists, Tag("id lists")],
    Discriminator(
        prompt_kind,
        custom_error_type="input_type",
        custom_error_message="must be a text, token ids or a list of either",
    ),
]


class EmbeddingsRequest(RequestModel):
    """POST /v1/embeddings. Token ids are those of the model's own tokenizer, with its special tokens."""

    input: EmbeddingInput
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Integer | None = Field(None, ge=1)
    user: str | None = None


@dataclass(frozen=True)
class EmbeddingsReply:
    """The vectors of one request, in the order of its inputs."""

    model: str
    embeddings: Sequence[Embedding]
    encoding_format: str

    @property
    def tokens(self) -> int:
        """Tokens of all inputs."""
        return sum(embedding.tokens for embedding in self.embeddings)

    def body(self) -> bytes:
        """The JSON of the response; each vector is encoded by itself, so that other threads can run in between."""
        usage = {"prompt_tokens": self.tokens, "total_tokens": self.tokens}
        rest = json.dumps({"object": "list", "model": self.model, "usage": usage})
        return f'{rest[:-1]}, "data": [{", ".join(self._items())}]}}'.encode()

    def _items(self) -> Iterator[str]:
        for index, embedding in enumerate(self.embeddings):
            vector: list[float] | str = embedding.vector
            if self.encoding_format == "base64":
                vector = base64.b64encode(struct.pack(f"<{len(vector)}f", *embedding.vector)).decode()
            yield json.dumps({"object": "embedding", "index": index, "embedding": vector})


async def embed(state: ServerState, body: EmbeddingsRequest, key: ApiKey, admitted: AdmittedRequest) -> EmbeddingsReply:
    """The vectors of an admitted request, counted for its key. Raises ApiError that names the field at fault."""
    name, engine = state.require_embedder()
    if body.model not in (None, name):
        raise state.model_not_found(str(body.model), [name])
    inputs = _checked_inputs(name, engine, body)
    start, outcome = time.monotonic(), "aborted"
    found: list[Embedding | None] = [None] * len(inputs)
    try:
        async with state.embedding_queue.slot(admitted):
            await _embed_all(state, engine, inputs, found)
        outcome = "completed"
    except Exception:
        outcome = "failed"
        raise
    finally:
        reply = EmbeddingsReply(name, [one for one in found if one], body.encoding_format)
        state.metrics.prompt_tokens.labels(name).inc(reply.tokens)
        state.count_usage(
            UsageRecord(
                time=state.usage.timestamp(),
                id=f"embd-{uuid.uuid4().hex}",
                key=key.name,
                model=name,
                outcome=outcome,
                prompt_tokens=reply.tokens,
                completion_tokens=0,
                seconds=round(time.monotonic() - start, 3),
            )
        )
    return reply


async def _embed_all(
    state: ServerState, engine: EmbeddingEngine, inputs: Sequence[Input], found: list[Embedding | None]
) -> None:
    """Compute all vectors into `found`; few at a time, so that a short request does not wait for all of a batch."""
    remaining = iter(enumerate(inputs))

    async def work() -> None:
        for index, (field, one) in remaining:
            try:
                found[index] = await asyncio.get_running_loop().run_in_executor(state.embedding_pool, engine.embed, one)
            except UserError as error:
                code = "context_length_exceeded" if isinstance(error, InputTooLong) else "invalid_request"
                raise ApiError(400, f"{field}: {error}", field, code) from error

    workers = [asyncio.create_task(work()) for _ in range(min(EMBEDDING_SLOTS, len(inputs)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()


def _checked_inputs(name: str, engine: EmbeddingEngine, body: EmbeddingsRequest) -> list[Input]:
    """The inputs of a request, each with the name of its field."""
    if body.dimensions not in (None, engine.size):
        message = f"dimensions: the vectors of {name} have {engine.size} dimensions, and are not shortened"
        raise ApiError(400, message, "dimensions", "unsupported_parameter")
    inputs, is_list = _inputs(body.input)
    named = [(f"input.{index}" if is_list else "input", one) for index, one in enumerate(inputs)]
    for field, one in named:
        _check_ids(engine, field, one)
    return named


def _inputs(given: str | list[str] | list[int] | list[list[int]]) -> tuple[Sequence[str | list[int]], bool]:
    """The inputs, and whether they were a list."""
    if isinstance(given, str):
        return [given], False
    ids = [one for one in given if isinstance(one, int)]
    return ([ids], False) if ids else ([one for one in given if not isinstance(one, int)], True)


def _check_ids(engine: EmbeddingEngine, field: str, given: str | list[int]) -> None:
    if not given:
        raise ApiError(400, f"{field}: the input is empty", field, "invalid_request")
    if isinstance(given, str):
        return
    if max(given) >= engine.vocab_size:
        message = (
            f"{field}: the id {max(given)} is not below {engine.vocab_size}, the vocabulary of this model; send texts, "
            "or ids of its own tokenizer (LangChain: check_embedding_ctx_length=False)"
        )
        raise ApiError(400, message, field, "invalid_request")
    if len(given) > engine.max_tokens:
        error = InputTooLong(len(given), engine.max_tokens)
        raise ApiError(400, f"{field}: {error}", field, "context_length_exceeded")
