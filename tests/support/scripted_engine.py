"""An engine that says what it is told to: for what no real model can be made to do at will.

The last user turn is the script, one of

    say TEXT            the text, as a tuned model writes it (an empty header line first)
    raw TEXT            the text from the first character on, header and all
    count N SECONDS     N tokens, the seconds before each
    fail N              N tokens, then an exception
    refuse              a UserError before the first token
    broken              a BrokenModel before the first token
"""

import json
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

from entrypoints.answer import decode
from entrypoints.checkpoint.tokenizer import Tokenizer
from entrypoints.engines.base import Token
from entrypoints.errors import BrokenModel, UserError
from entrypoints.prompt import PromptFormat
from entrypoints.sampling import Sampling

FEATURES = frozenset({"seed", "top_logprobs", "repetition_penalty", "frequency_penalty", "presence_penalty"})


class ScriptedEngine:
    """Follows the Engine protocol; `prompts` and `samplings` are what was asked, `running` what runs now."""

    name = "scripted"
    features = FEATURES

    def __init__(
        self,
        tokenizer: Tokenizer,
        slots: int = 2,
        window: int = 2048,
        adapters: Mapping[str, PromptFormat] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.slots = slots
        self.window = window
        self.adapters = dict(adapters or {})
        self.prompt_format = PromptFormat()
        self.broken: str | None = None
        self.prompts: list[list[int]] = []
        self.samplings: list[Sampling] = []
        self.running = 0
        self.most_running = 0
        self.closed = False
        self._guard = threading.Lock()

    def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: str | None = None,
        cancelled: threading.Event | None = None,
    ) -> Generator[Token, None, None]:
        """Act the script out."""
        with self._guard:
            self.prompts.append(list(prompt))
            self.samplings.append(sampling)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            for number, step in enumerate(self._steps(script_of(prompt, self.tokenizer))):
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
        """One by one."""
        return [list(map(int, self.generate(prompt, sampling))) for prompt in prompts]

    def close(self) -> None:
        """Nothing runs."""
        self.closed = True

    def _steps(self, script: str) -> Iterator[tuple[float, int] | Exception]:
        verb, _, rest = script.partition(" ")
        words = rest.split()
        if verb == "say":
            yield from ((0, id_) for id_ in [*self.tokenizer.encode("\n"), *self.tokenizer.encode(rest)])
        elif verb == "raw":
            # as the model writes it: a header line, then the body with a dummy prefix of its own
            head, newline, body = rest.partition("\n")
            ids = [*self.tokenizer.encode(head + newline), *(self.tokenizer.encode(body) if body else [])]
            yield from ((0, id_) for id_ in ids)
        elif verb == "ids":
            yield from ((0, id_) for id_ in json.loads(rest))
        elif verb in ("count", "fail"):
            for number in range(int(words[0])):
                yield float(words[1]) if len(words) > 1 else 0, self.tokenizer.encode(f"{number % 10}")[-1]
            if verb == "fail":
                yield RuntimeError("the script says so")
        elif verb == "refuse":
            yield UserError("the engine refuses", "ask otherwise")
        elif verb == "broken":
            yield BrokenModel("the model computes nonsense", "load another")


def script_of(prompt: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of the last user turn of a prompt; of the whole prompt if it has no turns."""
    ids = list(prompt)
    user, ends = (
        tokenizer.control("<|user|>"),
        {tokenizer.control(f"<|{role}|>") for role in ("assistant", "observation")},
    )
    if user in ids:
        ids = ids[len(ids) - ids[::-1].index(user) :]
        ids = ids[: next((place for place, id_ in enumerate(ids) if id_ in ends), len(ids))]
    return decode(ids, tokenizer).strip()


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Poll until it holds; raises AssertionError after `seconds`, which only a test that fails waits for."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)
