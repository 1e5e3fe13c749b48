"""The interface between an engine and all that talks to a model. An engine takes token ids and gives token ids."""

from collections.abc import Generator, Sequence
from typing import Protocol

from entrypoints.checkpoint.tokenizer import Tokenizer
from entrypoints.prompt import PromptFormat
from entrypoints.sampling import Sampling


class Engine(Protocol):
    """A loaded model."""

    tokenizer: Tokenizer
    prompt_format: PromptFormat  # what the checkpoint, or its active adapter, was taught
    window: int  # tokens of prompt and answer together

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Generator[int, None, None]:
        """Yield the answer's ids one by one, without the stop id; closing the generator stops the model.

        Raises UserError when the prompt leaves no room in the window.
        """

    def generate_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """Answers to several prompts at once, without their stop ids; the same ids as one by one at temperature 0."""
