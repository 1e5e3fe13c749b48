"""An engine that follows a script, for behavior that a real model cannot be made to show.

The last user turn is the script, one of

    say TEXT            the text, as a fine-tuned model writes it (an empty header line first)
    raw TEXT            the text from the first character on, header and all
    count N SECONDS     N tokens, the seconds before each
    fail N              N tokens, then an exception
    refuse              a UserError before the first token
    broken              a ModelError before the first token
    steps SCRIPTS       scripts separated by lines `---`: the n-th after n - 1 results of tools
"""

import json
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

from entrypoints.chat_format.answer_parser import decode
from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.chat_format.sampling import Sampling
from entrypoints.checkpoint.tokenizer import Tokenizer
from entrypoints.engines.base import Token
from entrypoints.errors import ModelError, UserError

FEATURES = frozenset({"seed", "top_logprobs", "repetition_penalty", "frequency_penalty", "presence_penalty", "grammar"})


class ScriptedEngine:
    """Implements Engine; `prompts` and `samplings` record the calls, `running` counts the ones in progress."""

    name = "scripted"
    features = FEATURES

    def __init__(
        self,
        tokenizer: Tokenizer,
        slots: int = 2,
        context_length: int = 2048,
        adapters: Mapping[str, PromptFormat] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.slots = slots
        self.context_length = context_length
        self.adapters = dict(adapters or {})
        self.prompt_format = PromptFormat()
        self.fatal_error: str | None = None
        self.prompts: list[list[int]] = []
        self.samplings: list[Sampling] = []
        self.running = 0
        self.max_running = 0
        self.closed = False
        self._guard = threading.Lock()

    def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: str | None = None,
        cancelled: threading.Event | None = None,
    ) -> Generator[Token, None, None]:
        """Follow the script."""
        with self._guard:
            self.prompts.append(list(prompt))
            self.samplings.append(sampling)
            self.running += 1
            self.max_running = max(self.max_running, self.running)
        try:
            for number, step in enumerate(self._steps(script_of(prompt, self.tokenizer), prompt)):
                if number >= sampling.max_new_tokens:
                    return
                if isinstance(step, Exception):
                    raise step
                seconds, id_ = step
                if seconds and (cancelled or threading.Event()).wait(seconds):
                    return
                yield Token(id_, -0.5, [(id_, -0.5)] * (sampling.top_logprobs or 0))
        finally:
            with self._guard:
                self.running -= 1

    def generate_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """Answers one by one."""
        return [list(map(int, self.generate(prompt, sampling))) for prompt in prompts]

    def close(self) -> None:
        """Record that it was closed."""
        self.closed = True

    def _steps(self, script: str, prompt: Sequence[int]) -> Iterator[tuple[float, int] | Exception]:
        verb, _, rest = script.partition(" ")
        arguments = rest.split()
        if verb == "steps":
            results = list(prompt).count(self.tokenizer.special_token_id("<|observation|>"))
            yield from self._steps(rest.split("\n---\n")[results], prompt)
        elif verb == "say":
            yield from ((0, id_) for id_ in [*self.tokenizer.encode("\n"), *self.tokenizer.encode(rest)])
        elif verb == "raw":
            # as the model writes it: a header line, then the body, encoded separately
            head, newline, body = rest.partition("\n")
            ids = [*self.tokenizer.encode(head + newline), *(self.tokenizer.encode(body) if body else [])]
            yield from ((0, id_) for id_ in ids)
        elif verb == "ids":
            yield from ((0, id_) for id_ in json.loads(rest))
        elif verb in ("count", "fail"):
            for number in range(int(arguments[0])):
                yield float(arguments[1]) if len(arguments) > 1 else 0, self.tokenizer.encode(f"{number % 10}")[-1]
            if verb == "fail":
                yield RuntimeError("the script says so")
        elif verb == "refuse":
            yield UserError("the engine refuses", "ask otherwise")
        elif verb == "broken":
            yield ModelError("the model computes nonsense", "load another")


def script_of(prompt: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of the last user turn of a prompt, or the whole prompt if it has no turns."""
    ids = list(prompt)
    user, ends = (
        tokenizer.special_token_id("<|user|>"),
        {tokenizer.special_token_id(f"<|{role}|>") for role in ("assistant", "observation")},
    )
    if user in ids:
        ids = ids[len(ids) - ids[::-1].index(user) :]
        ids = ids[: next((place for place, id_ in enumerate(ids) if id_ in ends), len(ids))]
    return decode(ids, tokenizer).strip()


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Poll until the condition is true; raises AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.005)
