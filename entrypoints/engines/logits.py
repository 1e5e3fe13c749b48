"""What happens to the scores of the next token before temperature and top_p: checks, records, penalties."""

import queue

import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from entrypoints.engines.base import Token
from entrypoints.errors import BrokenModel
from entrypoints.sampling import Sampling


def refuse_broken_numbers(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Raise BrokenModel on NaN and infinity, which the choice would turn into some token or other."""
    if torch.isnan(scores).any() or torch.isposinf(scores).any():
        raise BrokenModel("the model computed numbers that are none (NaN)", "load it with --dtype float32 or bfloat16")
    return scores


class Recorder:
    """Remembers the log probabilities of each step, in the order of the steps; `most` as Sampling.top_logprobs."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._steps: queue.SimpleQueue = queue.SimpleQueue()  # written by the model's thread, read by the caller's

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Record row 0 of the scores; they go on unchanged."""
        if self._most is not None:
            self._steps.put(torch.log_softmax(scores[0].float(), dim=-1))
        return scores

    def token(self, id_: int) -> Token:
        """The next generated id with what its step recorded."""
        step = self._steps.get()
        values, ids = step.topk(self._most) if self._most else (step.new_empty(0), step.new_empty(0))
        return Token(id_, float(step[id_]), list(zip(ids.tolist(), values.tolist(), strict=True)))


class Penalties:
    """OpenAI's frequency and presence penalty on the answer, and the usual repetition penalty on prompt and answer."""

    def __init__(self, sampling: Sampling, prompt_length: int) -> None:
        self._sampling = sampling
        self._prompt_length = prompt_length
        self._used = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) != (1, 0, 0)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary) with the penalties of this request."""
        if not self._used:
            return scores
        wanted = self._sampling
        if wanted.repetition_penalty != 1:
            seen = torch.gather(scores, 1, ids)
            weaker = torch.where(seen < 0, seen * wanted.repetition_penalty, seen / wanted.repetition_penalty)
            scores = scores.scatter(1, ids, weaker)
        written = ids[:, self._prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, written, torch.ones_like(written, dtype=scores.dtype))
        return scores - wanted.frequency_penalty * counts - wanted.presence_penalty * (counts > 0)


class SeededChoice:
    """Draws each token with random numbers of its own, and leaves no other choice.

    The generator that all of torch shares would deal its numbers out to all answers that run at the same time, and go
    on from the seed with the next answer that wants to be another one each time.
    """

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._random = torch.Generator(device).manual_seed(sampling.seed)
        self._warpers = [TemperatureLogitsWarper(float(sampling.temperature))]
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(sampling.top_p)))

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary) that are finite for the drawn token alone."""
        for warper in self._warpers:
            scores = warper(ids, scores)
        drawn = torch.multinomial(scores.softmax(dim=-1), 1, generator=self._random)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)
