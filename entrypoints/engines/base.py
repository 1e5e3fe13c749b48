"""The interface that every engine implements. Engines consume and produce token ids; text is handled elsewhere."""

import threading
from collections.abc import Generator, Mapping, Sequence
from typing import Protocol

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.chat_format.sampling import Sampling
from entrypoints.checkpoint.tokenizer import Tokenizer
from entrypoints.errors import UserError

# What an engine may support beyond the required parameters of `Sampling`
FEATURES = frozenset(
    {
        "seed",
        "top_logprobs",
        "prompt_logprobs",
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
        "json_schema",
        "grammar",
    }
)


class Token(int):
    """A generated token id, with log probabilities if `Sampling.top_logprobs` requested them.

    logprob: natural logarithm of its probability before temperature and top_p. top: (id, logprob), most likely first.
    """

    logprob: float | None
    top: tuple[tuple[int, float], ...]

    def __new__(cls, id_: int, logprob: float | None = None, top: Sequence[tuple[int, float]] = ()) -> "Token":
        """A token with its log probabilities."""
        token = super().__new__(cls, id_)
        token.logprob = logprob
        token.top = tuple(top)
        return token


class JsonSchemaError(UserError):
    """`Sampling.json_schema` is malformed, not supported or too large."""


class Engine(Protocol):
    """A loaded model. Thread-safe: calls beyond `slots` wait in a queue."""

    @property
    def name(self) -> str:
        """One of transformers, llamacpp, vllm."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the checkpoint."""

    @property
    def prompt_format(self) -> PromptFormat:
        """The format that the checkpoint, or `EngineOptions.adapter`, was trained with."""

    @property
    def adapters(self) -> Mapping[str, PromptFormat]:
        """Adapters that `generate` accepts by name, each with the prompt format it was trained with."""

    @property
    def context_length(self) -> int:
        """Maximum number of tokens of a prompt and its answer together."""

    @property
    def slots(self) -> int:
        """Number of answers that are generated concurrently."""

    @property
    def fatal_error(self) -> str | None:
        """Why the process must be restarted; None while the engine works."""

    @property
    def features(self) -> frozenset[str]:
        """Optional fields of Sampling that are supported: seed, top_logprobs, json_schema, grammar, the penalties.

        `prompt_logprobs` means that `score` is supported.
        """

    def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: str | None = None,
        cancelled: threading.Event | None = None,
    ) -> Generator[Token, None, None]:
        """Yield the tokens of the answer, without the stop token; closing the generator frees its slot.

        Setting `cancelled` ends the generator too, also while it waits for a slot or processes its prompt.
        Raises UserError before the first token if the prompt fills the context window.
        """

    def score(
        self,
        prompt: Sequence[int],
        top_logprobs: int,
        adapter: str | None = None,
        cancelled: threading.Event | None = None,
    ) -> list[Token]:
        """The ids of a prompt, each with its log probability after the ids before it; the first has none.

        Setting `cancelled` ends the call early, with fewer tokens. Raises UserError if the prompt fills the context
        window.
        """

    def generate_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """Answers to several prompts, without stop tokens; at temperature 0 the same ids as one by one."""

    def close(self) -> None:
        """Stop all threads and free the memory; calls in progress end with an error."""
