"""The interface between an engine and all that talks to a model. An engine takes token ids and gives token ids."""

import threading
from collections.abc import Generator, Mapping, Sequence
from typing import Protocol

from entrypoints.checkpoint.tokenizer import Tokenizer
from entrypoints.prompt import PromptFormat
from entrypoints.sampling import Sampling


class Token(int):
    """A generated id, with what the engine knows of it if `Sampling.top_logprobs` asked for it.

    logprob: natural logarithm of its probability before temperature and top_p. top: (id, logprob), likeliest first.
    """

    logprob: float | None
    top: tuple[tuple[int, float], ...]

    def __new__(cls, id_: int, logprob: float | None = None, top: Sequence[tuple[int, float]] = ()) -> "Token":
        token = super().__new__(cls, id_)
        token.logprob = logprob
        token.top = tuple(top)
        return token


class Engine(Protocol):
    """A loaded model. Safe to call from several threads: calls beyond `slots` wait for their turn."""

    name: str  # transformers | llamacpp | vllm
    tokenizer: Tokenizer
    prompt_format: PromptFormat  # what the checkpoint was taught, or the one adapter it was loaded with
    adapters: Mapping[str, PromptFormat]  # adapters to choose from by name, and what each was taught
    window: int  # tokens of prompt and answer together
    slots: int  # answers that are generated at the same time
    broken: str | None  # why the process should be replaced, None while it works
    features: frozenset[str]  # fields of Sampling that it honours: seed, top_logprobs, json_schema, …_penalty

    def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: str | None = None,
        cancelled: threading.Event | None = None,
    ) -> Generator[Token, None, None]:
        """Yield the answer's tokens one by one, without the stop id; closing the generator frees the slot at once.

        Setting `cancelled` ends the generator too, also while it waits for its turn or reads its prompt.
        Raises UserError when the prompt leaves no room in the window, before the first token.
        """

    def generate_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """Answers to several prompts at once, without their stop ids; the same ids as one by one at temperature 0."""

    def close(self) -> None:
        """Stop its threads and give its memory back; calls that still run end with an error."""
