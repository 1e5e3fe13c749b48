"""Talk to a converted model: in the terminal, with one --prompt, or with a line of standard input for each question.

In the terminal `clear` starts anew and `stop` ends; Ctrl-C stops an answer, and at the question the program.
"""

import argparse
import io
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from entrypoints.errors import UserError
from entrypoints.prompt import Message
from entrypoints.sampling import Sampling
from entrypoints.settings import DEVICES, LOADS, Settings

logger = logging.getLogger(__name__)
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm chat`."""
    parser.add_argument("--model", type=Path, help="converted checkpoint or GGUF file; overrides MODEL_PATH")
    parser.add_argument("--adapter", type=Path, help="converted LoRA or P-Tuning v2 adapter; overrides ADAPTER_PATH")
    parser.add_argument("--device", choices=DEVICES, help="overrides DEVICE; a GGUF file runs on the processor")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of a folder's weights; a GGUF file has its own"
    )
    parser.add_argument(
        "--load-in", choices=LOADS, help="let bitsandbytes make the weights smaller as they load (CUDA, CPU)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="check every file's hash before loading; a GGUF file's against the record that glm prepare writes",
    )
    parser.add_argument("--prompt", help="ask this once and end")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each answer")
    add_sampling_arguments(parser)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that become a `Sampling`."""
    default = Sampling()
    parser.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens, help="longest answer")
    parser.add_argument(
        "--temperature", type=float, default=default.temperature, help="0 always takes the likeliest token"
    )
    parser.add_argument("--top-p", type=float, default=default.top_p, help="share of probability to choose from")
    parser.add_argument("--top-k", type=int, help="number of tokens to choose from")
    parser.add_argument(
        "--repetition-penalty", type=float, default=default.repetition_penalty, help="above 1 repeats less"
    )
    parser.add_argument("--seed", type=int, help="the same answer for the same seed")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Load the model and answer until the questions end."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # broken text in a pipe or a paste must not end the talk
    sampling = Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )
    model = args.model or settings.model_path
    if not model:
        raise UserError("no model is named", "add --model DIR or set MODEL_PATH")
    from entrypoints.conversation import load_chat

    adapter = args.adapter or settings.adapter_path or None
    chat = load_chat(model, adapter, args.device or settings.device, args.dtype, args.verify, args.load_in)
    system = [Message("system", args.system)] if args.system else []
    if args.prompt is not None:
        _answer(chat, [*system, Message("user", args.prompt)], sampling, args.json)
        return 0
    turns = list(system)
    for query in _questions():
        if query == "clear":
            turns = list(system)
            _clear_screen()
        else:
            turns = _turn(chat, [*turns, Message("user", query)], sampling, args.json)
    return 0


def _turn(chat: object, turns: list[Message], sampling: Sampling, as_json: bool) -> list[Message]:
    """Answer within a talk: in the terminal neither Ctrl-C nor too long a question ends it."""
    try:
        return _answer(chat, turns, sampling, as_json, stoppable=_in_terminal())
    except UserError as error:
        if not _in_terminal():
            raise
        print(f"glm: {error}", file=sys.stderr)
        return turns[:-1]


def _answer(
    chat: object, turns: list[Message], sampling: Sampling, as_json: bool, stoppable: bool = False
) -> list[Message]:
    from entrypoints.conversation import answered

    reply, stream = None, chat.reply(turns, sampling)
    try:
        for reply, text in stream:  # noqa: B007 - the last reply is used below
            if not as_json:
                print(text, end="", flush=True)
    except KeyboardInterrupt:
        if not stoppable:
            raise
        stream.close()
        print(" (stopped)", end="", file=sys.stderr, flush=True)
    if reply is None:  # stopped before its first word
        print(file=sys.stderr)
        return turns[:-1]
    if reply.dropped_turns:
        logger.warning("the window is full: the %d oldest turns were left out", reply.dropped_turns)
    if as_json:
        print(json.dumps(_as_dict(turns, reply), ensure_ascii=False), flush=True)
    else:
        for call in reply.answer.tool_calls:
            print(f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)})", end="")
        print(flush=True)
    return answered(turns, reply)


def _as_dict(turns: list[Message], reply: object) -> dict:
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
    """Questions typed in the terminal, or the lines of a pipe; ends at `stop` or the end of the input."""
    if _in_terminal():
        import readline  # noqa: F401 - gives input() its line editing and history

        print("Ask; `clear` starts anew, `stop` ends.", file=sys.stderr)
    while True:
        try:
            query = _typed() if _in_terminal() else next(sys.stdin or iter(()), None)
        except EOFError:
            return
        if query is None or query.strip() == "stop":
            return
        if query.strip():
            yield query.strip()


def _typed() -> str:
    if sys.stdout.isatty():
        return input("\n> ")
    print("\n> ", end="", file=sys.stderr, flush=True)  # stdout goes to a file: answers only
    return input()


def _in_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _clear_screen() -> None:
    if sys.stdout.isatty():
        print("\033[2J\033[H", end="", flush=True)
