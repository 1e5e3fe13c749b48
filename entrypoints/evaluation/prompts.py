"""The prompts of test rows, as in training; which rows have one is known before a model is loaded."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from entrypoints.chat_format.prompt import PromptFormat, split_answer
from entrypoints.chat_format.truncation import TokenLimitError
from entrypoints.checkpoint.gguf_reader import open_gguf
from entrypoints.checkpoint.tokenizer import Tokenizer
from entrypoints.dataset.examples import Example, SkippedRow
from entrypoints.dataset.skipped_rows import usable_rows
from entrypoints.errors import UserError


@dataclass(frozen=True)
class PromptEncoding:
    """How a model is asked. formats: several if models with different ones answer the same rows."""

    tokenizer: Tokenizer
    formats: tuple[PromptFormat, ...]
    max_source_length: int
    context_length: int

    @classmethod
    def of_model(cls, model: Path, adapter: Path | None, max_source_length: int) -> "PromptEncoding":
        """That of a folder or GGUF file, with an adapter. Raises UserError: it is missing or damaged."""
        if model.suffix == ".gguf":
            gguf = open_gguf(model)
            return cls(gguf.tokenizer, (gguf.prompt_format,), max_source_length, gguf.context_length)
        from entrypoints.checkpoint.adapters import open_adapter  # these import torch
        from entrypoints.checkpoint.native import open_native

        base = open_native(model, quantized=True)
        prompt_format = open_adapter(adapter, base.model_config).prompt_format if adapter else base.prompt_format
        return cls(base.tokenizer, (prompt_format,), max_source_length, base.model_config.context_length)

    def length(self, row: Example) -> int:
        """Tokens of the longest prompt of a row. Raises UserError: max_source_length does not hold it."""
        lengths: list[int] = []
        errors: list[TokenLimitError] = []
        for prompt_format in self.formats:
            try:
                lengths.append(len(encode_prompt(row, prompt_format, self.tokenizer, self.max_source_length)))
            except TokenLimitError as error:
                errors.append(error)
        if errors:
            raise max(errors, key=lambda error: error.least)  # the value that holds the row in every format
        return max(lengths)


def encode_prompt(row: Example, prompt_format: PromptFormat, tokenizer: Tokenizer, max_source_length: int) -> list[int]:
    """The prompt of a row, cut to a length. Raises UserError: the length does not hold what is never cut."""
    before, _ = split_answer(row.messages())
    turns, _ = prompt_format.truncate(before, tokenizer, max_source_length)
    return prompt_format.encode(turns, tokenizer)


def answerable_rows(
    rows: Sequence[Example], skipped: Iterable[SkippedRow], encoding: PromptEncoding, max_skipped: int | None
) -> tuple[list[Example], list[SkippedRow]]:
    """The rows that have a prompt, and all skipped rows: `skipped`, then those that have none.

    Raises UserError: more skipped rows than `max_skipped`, no usable row, or a prompt that fills the context window.
    """
    measured, skipped = usable_rows(rows, skipped, lambda row: (encoding.length(row), row), max_skipped)
    length, longest = max(measured, key=lambda pair: pair[0])
    if length >= encoding.context_length:
        raise UserError(
            f"{longest.file}:{longest.line}: the longest prompt has {length} tokens, the context length is "
            f"{encoding.context_length}",
            f"lower --max-source-length to at most {encoding.context_length - 1}",
        )
    return [row for _, row in measured], skipped
