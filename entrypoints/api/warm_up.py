"""Prompts that the server computes before it accepts requests, so that the first client does not wait for them."""

import codecs
import time
from collections.abc import Callable
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fastapi.exceptions import RequestValidationError

from entrypoints.api.errors import ApiError, from_validation_error
from entrypoints.api.openai_schema import ChatMessage, ChatRequest
from entrypoints.api.request_body import parse_body
from entrypoints.api.requests import encode_messages
from entrypoints.engines.base import Engine
from entrypoints.errors import UserError

if TYPE_CHECKING:
    from entrypoints.engines.llamacpp.engine import LlamaCppEngine

logger = getLogger(__name__)
QUESTION_ROLES = ("user", "tool", "observation")
REMEDY = 'write one JSON object per line, such as {"messages": [{"role": "system", "content": "..."}]}'


@dataclass(frozen=True)
class WarmPrompt:
    """One line of the file of --warm: where it is, and the chat request in it."""

    place: str
    request: ChatRequest


def read_warm_prompts(file: Path) -> list[WarmPrompt]:
    """The chat requests of a JSON Lines file. Raises UserError naming the line and the field at fault."""
    try:
        lines = file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read --warm {file} ({error})", "pass a file with one prompt per line") from error
    places = [(f"--warm {file}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not places:
        raise UserError(f"--warm {file} contains no prompt", REMEDY)
    return [WarmPrompt(place, _request(line, place)) for place, line in places]


def warmed(load: Callable[[], Engine], file: Path | None, engine_name: str) -> Callable[[], Engine]:
    """`load`, after which the prompts of `file`, which is read now, are computed; `load` itself without a file.

    Raises UserError: the file or the engine cannot be used; the result raises it for a prompt that is too long.
    """
    if file is None:
        return load
    if engine_name != "llamacpp":
        raise UserError(f"--warm is not supported by the engine {engine_name}", "omit it, or use a GGUF file")
    prompts = read_warm_prompts(file)

    def load_warm() -> Engine:
        engine = load()
        _warm_up(cast("LlamaCppEngine", engine), prompts)
        return engine

    return load_warm


def _warm_up(engine: "LlamaCppEngine", prompts: list[WarmPrompt]) -> None:
    start = time.monotonic()
    for prompt in prompts:
        messages = [*prompt.request.messages]
        if messages[-1].role not in QUESTION_ROLES:  # a system prompt alone: up to the start of the question
            messages.append(ChatMessage(role="user", content=""))
        try:
            engine.warm(encode_messages(engine, None, messages, prompt.request.tools or []))
        except (ApiError, UserError) as error:
            message = error.detail if isinstance(error, ApiError) else error.problem
            raise UserError(f"{prompt.place}: {message}", "shorten the prompt") from error
    if len(prompts) > engine.slots and not engine.keeps_prefixes:
        logger.warning(
            "--warm has %d prompts, but without --prefix-cache each of the %d slots holds one: the first may be gone",
            len(prompts),
            engine.slots,
        )
    logger.info("%d prompts of --warm read in %.1f s", len(prompts), time.monotonic() - start)


def _request(line: bytes, place: str) -> ChatRequest:
    try:
        return parse_body(ChatRequest, line)
    except RequestValidationError as error:
        raise UserError(f"{place}: {from_validation_error(error).message}", REMEDY) from error
