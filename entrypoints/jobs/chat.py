"""Chat with a model in the terminal, with one --prompt, or with one question per line of standard input.

In the terminal `clear` starts a new conversation and `stop` ends; Ctrl-C stops an answer, or at the prompt the program.
"""

import argparse
import contextlib
import io
import json
import locale
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrypoints import flags
from entrypoints.chat_format.prompt import Message
from entrypoints.chat_format.sampling import Sampling
from entrypoints.errors import UserError
from entrypoints.settings import Settings

if TYPE_CHECKING:
    from entrypoints.chat_session import Chat, Reply

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm chat`."""
    flags.add_model_flags(parser)
    flags.add_adapter_flag(parser)
    flags.add_loading_flags(parser)
    parser.add_argument("--prompt", help="answer this question and exit")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each answer")
    default = Sampling()
    flags.add_sampling_flags(parser, default)
    parser.add_argument(
        "--max-new-tokens", type=int, default=default.max_new_tokens, help="maximum tokens of an answer"
    )
    parser.add_argument("--top-k", type=int, help="number of most likely tokens to sample from")
    parser.add_argument(
        "--repetition-penalty", type=float, default=default.repetition_penalty, help="above 1: less repetition"
    )


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Load the model and answer until the input ends."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, None), (sys.stderr, None)):
        if isinstance(stream, io.TextIOWrapper):  # UTF-8, whatever the locale; None keeps what happens at errors
            stream.reconfigure(encoding="utf-8", errors=errors or stream.errors)
    sampling = Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )
    chat = _load(args, settings)
    conversation = _Conversation(chat, sampling, args.json)
    system = [Message("system", _utf8_argument("--system", args.system))] if args.system else []
    if args.prompt is not None:
        conversation.answer([*system, Message("user", _utf8_argument("--prompt", args.prompt))])
        return 0
    turns = list(system)
    for query in _questions():
        if query == "clear":
            turns = list(system)
            _clear_screen()
        else:
            turns = conversation.next_turn([*turns, Message("user", query)])
    return 0


def _load(args: argparse.Namespace, settings: Settings) -> "Chat":
    model = flags.required_model(args, settings)
    from entrypoints.chat_session import load_chat
    from entrypoints.engines.options import EngineOptions

    adapter = args.adapter or settings.adapter_path
    options = EngineOptions(
        adapter=Path(adapter) if adapter else None,
        device=args.device or settings.device,
        dtype=args.dtype,
        verify=args.verify,
        load_in=args.load_in,
        context_length=args.context_length,
    )
    return load_chat(model, options)


@dataclass(frozen=True)
class _Conversation:
    """Prints answers; each method returns the turns to continue with."""

    chat: "Chat"
    sampling: Sampling
    as_json: bool

    def next_turn(self, turns: list[Message]) -> list[Message]:
        """Answer the last turn; in the terminal neither Ctrl-C nor a question that is too long ends the program."""
        try:
            return self.answer(turns, stoppable=_in_terminal())
        except UserError as error:
            if not _in_terminal():
                raise
            print(f"glm: {error}", file=sys.stderr)
            return turns[:-1]

    def answer(self, turns: list[Message], stoppable: bool = False) -> list[Message]:
        """Answer the last turn; stoppable: Ctrl-C ends the answer only, else it raises KeyboardInterrupt."""
        from entrypoints.chat_session import with_reply

        reply, stream = None, self.chat.reply(turns, self.sampling)
        try:
            for reply, text in stream:  # noqa: B007 - the last reply is used below
                if not self.as_json:
                    print(text, end="", flush=True)
        except KeyboardInterrupt:
            if not stoppable:
                raise
            stream.close()
            print(" (stopped)", end="", file=sys.stderr, flush=True)
        if reply is None:  # stopped before the first token
            print(file=sys.stderr)
            return turns[:-1]
        if reply.dropped_turns:
            logger.warning("context length exceeded: the %d oldest turns were omitted", reply.dropped_turns)
        self._print_end(turns, reply)
        return with_reply(turns, reply)

    def _print_end(self, turns: list[Message], reply: "Reply") -> None:
        """Print what follows the streamed text: tool calls and a line break, or the JSON object."""
        if self.as_json:
            print(json.dumps(_as_dict(turns, reply), ensure_ascii=False), flush=True)
            return
        for call in reply.answer.tool_calls:
            print(f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)})", end="")
        print(flush=True)


def _as_dict(turns: list[Message], reply: "Reply") -> dict[str, Any]:
    return {
        "prompt": turns[-1].content,
        "response": reply.answer.content,
        "tool_calls": [{"name": call.name, "arguments": call.arguments} for call in reply.answer.tool_calls],
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "dropped_turns": reply.dropped_turns,
    }


def _questions() -> Iterator[str]:
    """Questions typed in the terminal, or the lines of a pipe, until `stop` or the end of the input."""
    if _in_terminal():
        _enable_line_editing()
        print("Type a question; `clear` starts a new conversation, `stop` ends.", file=sys.stderr)
    while True:
        try:
            query = _read_line() if _in_terminal() else next(sys.stdin or iter(()), None)
        except EOFError:
            return
        if query is None or query.strip() == "stop":
            return
        query = _without_invalid_bytes(query)
        if query.strip():
            yield query.strip()


def _enable_line_editing() -> None:
    """Line editing and history for input(); in a locale that is not UTF-8, readline takes Chinese for key codes."""
    for name in ("", "C.UTF-8", "en_US.UTF-8", "zh_CN.UTF-8"):  # "": the locale of the environment
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, name)
            if locale.nl_langinfo(locale.CODESET).upper().replace("-", "") == "UTF8":
                if name:
                    os.environ["LC_ALL"] = name  # readline reads it for each line
                import readline

                readline.parse_and_bind("set disable-completion on")
                return
    logger.warning("this system has no UTF-8 locale: line editing and history are off")


def _without_invalid_bytes(text: str) -> str:
    """The text with a replacement character for each byte that is not UTF-8, which is logged."""
    count = sum(0xDC80 <= ord(character) <= 0xDCFF for character in text)
    if count:
        logger.warning("the input is not UTF-8: %d bytes were replaced", count)
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return text


def _utf8_argument(flag: str, text: str) -> str:
    """The text of a flag, which Python decoded by the locale; raises UserError if it is not UTF-8."""
    try:
        return os.fsencode(text).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} is not UTF-8 (byte {error.start})", "encode it as UTF-8") from error


def _read_line() -> str:
    if sys.stdout.isatty():
        return input("\n> ")
    print("\n> ", end="", file=sys.stderr, flush=True)  # stdout is redirected: it receives answers only
    return input()


def _in_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _clear_screen() -> None:
    if sys.stdout.isatty():
        print("\033[2J\033[H", end="", flush=True)
