"""Logits processors that run before temperature and top_p: checks, log probabilities, penalties, seeded sampling.

Each takes the ids so far (B, T) and the logits of the next token (B, V), and returns logits (B, V).
"""

import queue
from collections.abc import Callable

import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from entrypoints.chat_format.sampling import Sampling
from entrypoints.engines.base import Token
from entrypoints.errors import ModelError


def check_finite_logits(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Raise ModelError for NaN and infinity, from which sampling would still select some token."""
    if torch.isnan(logits).any() or torch.isposinf(logits).any():
        raise ModelError("the model computed NaN or infinite logits", "load it with --dtype float32 or bfloat16")
    return logits


class LogprobRecorder:
    """Records the log probabilities of each step of one answer; `top_logprobs` as in Sampling, None records nothing."""

    def __init__(self, top_logprobs: int | None) -> None:
        self._top_logprobs = top_logprobs
        self._steps: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()  # (V,) each; written by another thread

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Record row 0 of the logits (B, V) and return them unchanged."""
        if self._top_logprobs is not None:
            self._steps.put(torch.log_softmax(logits[0].float(), dim=-1))
        return logits

    def token(self, id_: int) -> Token:
        """The next generated id with the log probabilities of its step."""
        logprobs = self._steps.get()  # (V,)
        if not self._top_logprobs:
            return Token(id_, float(logprobs[id_]))
        values, ids = logprobs.topk(self._top_logprobs)
        return Token(id_, float(logprobs[id_]), list(zip(ids.tolist(), values.tolist(), strict=True)))


class PenaltyProcessor:
    """OpenAI's frequency and presence penalty on the answer; repetition penalty on prompt and answer."""

    def __init__(self, sampling: Sampling, prompt_length: int) -> None:
        self._sampling = sampling
        self._prompt_length = prompt_length
        self._enabled = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) != (
            1,
            0,
            0,
        )

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) with the penalties applied."""
        if not self._enabled:
            return logits
        sampling = self._sampling
        if sampling.repetition_penalty != 1:
            seen = torch.gather(logits, 1, ids)  # (B, T)
            penalized = torch.where(seen < 0, seen * sampling.repetition_penalty, seen / sampling.repetition_penalty)
            logits = logits.scatter(1, ids, penalized)
        answer = ids[:, self._prompt_length :]  # (B, T - prompt length)
        ones = torch.ones_like(answer, dtype=logits.dtype)
        counts = torch.zeros_like(logits).scatter_add_(1, answer, ones)  # (B, V)
        return logits - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)


class SeededSampler:
    """Samples each token with its own random generator and masks all other tokens.

    torch's global generator would be shared by all concurrent answers, and a seed set on it would also make later
    unseeded answers repeat.
    """

    def __init__(self, sampling: Sampling, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._warpers: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
            TemperatureLogitsWarper(float(sampling.temperature))
        ]
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(sampling.top_p)))

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) that are finite for the sampled token only."""
        for warper in self._warpers:
            logits = warper(ids, logits)
        sampled = torch.multinomial(logits.softmax(dim=-1), 1, generator=self._generator)  # (B, 1)
        return torch.full_like(logits, -torch.inf).scatter(1, sampled, 0.0)
