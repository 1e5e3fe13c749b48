"""Conversations with a loaded model: history, context length, streamed text. Used from Python and by `glm chat`."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from entrypoints.chat_format.answer_parser import Answer, AnswerParser
from entrypoints.chat_format.prompt import Message, MessageLike, as_messages
from entrypoints.chat_format.sampling import Sampling
from entrypoints.engines.base import Engine
from entrypoints.engines.loading import check_engine_options, load_engine
from entrypoints.engines.options import EngineOptions
from entrypoints.errors import UserError

History = list[dict[str, Any]]  # messages in the format of ChatGLM3's own chat()


@dataclass
class Reply:
    """One answer, while it is generated and when it is complete."""

    prompt_tokens: int
    dropped_turns: int  # oldest turns omitted to fit the prompt into the context length
    completion_tokens: int = 0
    finish_reason: str = "stop"  # stop | length | cancelled
    answer: Answer = field(default_factory=Answer)


class Chat:
    """Talks to one model; keeps no history, so any number of conversations can share it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def chat(self, query: str, history: Iterable[MessageLike] = (), **sampling: Any) -> tuple[str, History]:
        """The complete answer and the history including it; `sampling`: fields of `Sampling`."""
        for result in self.stream_chat(query, history, **sampling):  # noqa: B007 - the last result is returned
            pass
        return result

    def stream_chat(
        self, query: str, history: Iterable[MessageLike] = (), **sampling: Any
    ) -> Iterator[tuple[str, History]]:
        """Yield the answer so far and the history including it, whenever text is added and once at the end."""
        if not isinstance(query, str):
            raise UserError(f"the query is {type(query).__name__}", "pass a string")
        known = [each.name for each in fields(Sampling)]
        if unknown := [name for name in sampling if name not in known]:
            raise UserError(f"unknown sampling parameter {', '.join(unknown)}", f"use {', '.join(known)}")
        turns = [*as_messages(history), Message("user", query)]
        for reply, text in self.reply(turns, Sampling(**sampling)):
            if text:
                yield reply.answer.content, _history(turns, reply)
        yield reply.answer.content, _history(turns, reply)

    def reply(self, turns: Sequence[Message], sampling: Sampling) -> Generator[tuple[Reply, str], None, None]:
        """Yield the growing reply with each new text chunk, at least once; the last chunk may be empty.

        If the history is too long, its oldest turns are omitted (`dropped_turns`). Closing the generator stops the
        model.
        Raises UserError if the system prompt and the question alone exceed the context length.
        """
        engine = self.engine
        max_prompt_tokens = engine.context_length - min(sampling.max_new_tokens, engine.context_length // 2)
        kept, dropped = engine.prompt_format.fit_to_context(turns, engine.tokenizer, max_prompt_tokens)
        prompt = engine.prompt_format.encode(kept, engine.tokenizer)
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, engine.context_length - len(prompt)))
        parser = AnswerParser(engine.tokenizer, _tool_names(turns))
        reply = Reply(len(prompt), dropped, finish_reason="cancelled", answer=parser.answer)
        ids = engine.generate(prompt, sampling)
        try:
            for id_ in ids:
                reply.completion_tokens += 1
                yield reply, parser.feed(id_)
            reply.finish_reason = "length" if reply.completion_tokens >= sampling.max_new_tokens else "stop"
        finally:
            ids.close()
            rest = parser.finish(is_cut=reply.finish_reason == "length")
        yield reply, rest


def load_chat(model: str | Path, options: EngineOptions | None = None) -> Chat:
    """Load a converted checkpoint or a GGUF file.

    Raises UserError for an unusable model or unsupported options, before transformers or llama.cpp is imported.
    """
    path, options = Path(model), options or EngineOptions()
    check_engine_options(path, options)
    return Chat(load_engine(path, options))


def with_reply(turns: Sequence[Message], reply: Reply) -> list[Message]:
    """The conversation including the reply; a tool call has the tool's name as metadata and its text as content."""
    answer = reply.answer
    text = [Message("assistant", answer.content)] if answer.content or not answer.tool_calls else []
    calls = [Message("assistant", call.source, call.name) for call in answer.tool_calls]
    return [*turns, *text, *calls]


def _history(turns: Sequence[Message], reply: Reply) -> History:
    messages = []
    for turn in with_reply(turns, reply):
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.role == "assistant":
            message["metadata"] = turn.metadata
        if turn.tools:
            message["tools"] = list(turn.tools)
        messages.append(message)
    return messages


def _tool_names(turns: Sequence[Message]) -> list[str]:
    tools = [tool for turn in turns for tool in turn.tools]
    return [tool.get("name") or tool.get("function", {}).get("name", "") for tool in tools if isinstance(tool, dict)]
