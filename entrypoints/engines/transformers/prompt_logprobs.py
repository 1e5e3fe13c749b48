"""Log probabilities of the ids of a prompt, in forward passes over a few hundred ids each."""

import threading
from collections.abc import Sequence

import torch
from transformers import DynamicCache, GlmForCausalLM

from entrypoints.engines.base import Token
from entrypoints.engines.transformers.logits_processors import check_finite_logits
from entrypoints.engines.transformers.prefix_model import CACHE

CHUNK_TOKENS = 256  # the logits of a chunk take 67 MB with the vocabulary of the 6B


def score_prompt(
    model: GlmForCausalLM, prompt: Sequence[int], top_logprobs: int, cancelled: threading.Event
) -> list[Token]:
    """Each id with its log probability after the ids before it; the first has none. Ends early when cancelled."""
    device = next(model.get_input_embeddings().parameters()).device
    ids = torch.tensor([prompt], device=device)  # (1, T)
    cache = DynamicCache(config=model.config)
    tokens = [Token(prompt[0])]
    for start in range(0, len(prompt) - 1, CHUNK_TOKENS):
        if cancelled.is_set():
            break
        chunk = ids[:, start : min(start + CHUNK_TOKENS, len(prompt) - 1)]
        logits = model(input_ids=chunk, use_cache=True, **{CACHE: cache}).logits[0].float()  # (T, V)
        logprobs = torch.log_softmax(check_finite_logits(chunk, logits), dim=-1)
        following = prompt[start + 1 : start + 1 + len(logprobs)]
        own = logprobs.gather(1, torch.tensor(following, device=logprobs.device).unsqueeze(1)).squeeze(1).tolist()
        values, likeliest = logprobs.topk(top_logprobs)  # (T, top_logprobs) each
        for id_, logprob, *top in zip(following, own, likeliest.tolist(), values.tolist(), strict=True):
            tokens.append(Token(id_, logprob, list(zip(*top, strict=True))))
    return tokens
