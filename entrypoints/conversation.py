"""A conversation with a loaded model: history, window, streamed text. Used from Python and by the commands."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from entrypoints.answer import Answer, AnswerReader
from entrypoints.engines.base import Engine
from entrypoints.engines.loading import check, engine_for, load, require_engine
from entrypoints.errors import UserError
from entrypoints.prompt import Message, as_messages
from entrypoints.sampling import Sampling


@dataclass
class Reply:
    """One answer while it grows and when it is done."""

    prompt_tokens: int
    dropped_turns: int  # oldest turns left out, so that the prompt fits the window
    completion_tokens: int = 0
    finish_reason: str = "stop"  # stop | length | cancelled
    answer: Answer = field(default_factory=Answer)


class Chat:
    """Talks to one model; holds no history of its own, so any number of conversations can share it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def chat(self, query: str, history: Iterable = (), **sampling: object) -> tuple[str, list[dict]]:
        """The whole answer and the history with it; sampling as the fields of `Sampling`."""
        for last in self.stream_chat(query, history, **sampling):  # noqa: B007 - each holds the whole history: keep one
            pass
        return last

    def stream_chat(self, query: str, history: Iterable = (), **sampling: object) -> Iterator[tuple[str, list[dict]]]:
        """Yield the answer so far and the history with it, each time some text is added, and once at the end."""
        if not isinstance(query, str):
            raise UserError(f"the query is {type(query).__name__}", "give a text")
        turns = [*as_messages(history), Message("user", query)]
        reply = None
        for reply, text in self.reply(turns, Sampling(**sampling)):
            if text:
                yield reply.answer.content, _history(turns, reply)
        yield reply.answer.content, _history(turns, reply)

    def reply(self, turns: Sequence[Message], sampling: Sampling) -> Iterator[tuple[Reply, str]]:
        """Yield the growing reply with each new piece of text; the last piece may be empty.

        Too long a history loses its oldest turns (`dropped_turns`). Closing the iterator stops the model.
        Raises UserError when the system prompt and the question alone do not fit the window.
        """
        engine = self.engine
        room = engine.window - min(sampling.max_new_tokens, engine.window // 2)
        kept, dropped = engine.prompt_format.fit(turns, engine.tokenizer, room)
        prompt = engine.prompt_format.encode(kept, engine.tokenizer)
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, engine.window - len(prompt)))
        reader = AnswerReader(engine.tokenizer, _tool_names(turns))
        reply = Reply(len(prompt), dropped, finish_reason="cancelled", answer=reader.answer)
        ids = engine.generate(prompt, sampling)
        try:
            for id_ in ids:
                reply.completion_tokens += 1
                yield reply, reader.feed(id_)
            reply.finish_reason = "length" if reply.completion_tokens >= sampling.max_new_tokens else "stop"
        finally:
            ids.close()
            rest = reader.finish()
        yield reply, rest


def load_chat(
    model: str | Path,
    adapter: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    verify: bool = False,
    load_in: str | None = None,
) -> Chat:
    """Load a converted checkpoint (and adapter), or a GGUF file, to talk to.

    A GGUF file runs in llama.cpp: without adapter, on the processor, in the precision it was written in.
    Raises UserError before anything slow if it cannot work.
    """
    path, adapters = Path(model), {"adapter": Path(adapter)} if adapter else {}
    if engine_for(path) == "llamacpp":
        check("llamacpp", path, adapters, load_in, device, dtype=dtype, verify=verify)
        return Chat(load("llamacpp", path, {}, verify=verify))
    require_engine("transformers")
    from entrypoints.checkpoint.native import open_native

    # what is wrong with the folder shows before transformers, imported in seconds, does
    if load_in or open_native(path, quantised=True).load_in:
        check("transformers", path, adapters, load_in, device)
    from entrypoints.engines.transformers_engine import TransformersEngine

    return Chat(TransformersEngine.load(path, Path(adapter) if adapter else None, device, dtype, verify, load_in))


def answered(turns: Sequence[Message], reply: Reply) -> list[Message]:
    """The conversation with the reply at its end; a tool call keeps its name as metadata and its text as content."""
    answer = reply.answer
    spoken = [Message("assistant", answer.content)] if answer.content or not answer.tool_calls else []
    calls = [Message("assistant", call.source, call.name) for call in answer.tool_calls]
    return [*turns, *spoken, *calls]


def _history(turns: Sequence[Message], reply: Reply) -> list[dict]:
    messages = []
    for turn in answered(turns, reply):
        message = {"role": turn.role, "content": turn.content}
        if turn.role == "assistant":
            message["metadata"] = turn.metadata
        if turn.tools:
            message["tools"] = list(turn.tools)
        messages.append(message)
    return messages


def _tool_names(turns: Sequence[Message]) -> list[str]:
    tools = [tool for turn in turns for tool in turn.tools]
    return [tool.get("name") or tool.get("function", {}).get("name", "") for tool in tools if isinstance(tool, dict)]
