"""Constrains answers to a grammar (GBNF), as llama.cpp and vLLM do themselves."""

from collections import defaultdict

import torch

from entrypoints.checkpoint.tokenizer import Tokenizer
from entrypoints.engines.transformers.grammar_states import GrammarStates, State

CHUNK = 256  # tokens that are examined before more are copied from the device
NEGLIGIBLE = 1e-4  # probability of all tokens that are not examined, relative to those that are allowed


class GrammarProcessor:
    """Masks the tokens with which the answer could no longer match; a stop token is allowed when it does.

    Tokens are examined from the most likely one on, until the others no longer count.
    """

    def __init__(self, grammar: str, tokenizer: Tokenizer, prompt_length: int, temperature: float) -> None:
        self._states = GrammarStates(grammar)
        self._tokenizer = tokenizer
        self._prompt_length = prompt_length
        self._temperature = temperature
        self._reached: dict[int, tuple[int, State | None]] = defaultdict(lambda: (0, self._states.start()))  # by row

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, V), minus infinity for all tokens that are not allowed; each call follows one more token."""
        masked = torch.full_like(logits, -torch.inf)
        for row in range(len(ids)):
            allowed = self._allowed(self._advance(row, ids[row, self._prompt_length :]), logits[row].float())
            masked[row, allowed] = logits[row, allowed]
        return masked

    def _advance(self, row: int, answer: torch.Tensor) -> State | None:
        """The state after the answer (T,) of a row, of which only the end is new."""
        length, state = self._reached[row]
        for id_ in answer[length:].tolist():
            state = self._states.advance(state, self._tokenizer.token_bytes(id_)) if state else None
        state = self._states.compact(state) if state else None
        self._reached[row] = len(answer), state
        return state

    def _allowed(self, state: State | None, logits: torch.Tensor) -> list[int]:
        stops = [*self._tokenizer.stop_ids]
        if state is None:
            return stops
        ordered, order = (logits / (self._temperature or 1.0)).softmax(dim=-1).sort(descending=True, stable=True)
        allowed: list[int] = []
        found, remaining = 0.0, 1.0
        for start in range(0, len(order), CHUNK):
            chunk = slice(start, start + CHUNK)
            for id_, probability in zip(order[chunk].tolist(), ordered[chunk].tolist(), strict=True):
                remaining -= probability
                if self._fits(state, id_) or (state.accepts and id_ in stops):
                    allowed.append(id_)
                    found += probability
                    if self._temperature == 0 or remaining < NEGLIGIBLE * found:
                        return allowed
        return allowed or stops

    def _fits(self, state: State, id_: int) -> bool:
        """Whether the answer can still match after a token."""
        data = self._tokenizer.token_bytes(id_)
        return bool(data) and self._states.advance(state, data) is not None
