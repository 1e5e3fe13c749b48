"""Log probabilities of the ids of a prompt.

llama.cpp reports probabilities of generated ids only. Each id is therefore generated after the ids before it, which are
in its cache, with a bias that leaves no other choice; the reported probabilities are those without the bias. This takes
as long as generating the prompt would.
"""

import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

from entrypoints.checkpoint.tokenizer import Tokenizer
from entrypoints.engines.base import Token

BIAS = 1e6
COMPLETE_CHARACTER = ord("a")

Stream = Callable[[dict[str, Any], threading.Event | None], Generator[Token, None, None]]


def score_prompt(
    stream: Stream,
    request_for: Callable[[Sequence[int]], dict[str, Any]],
    prompt: Sequence[int],
    tokenizer: Tokenizer,
    cancelled: threading.Event | None,
) -> list[Token]:
    """Each id with its log probability after the ids before it; the first has none. Ends early when cancelled.

    request_for: a greedy request for one id after these ids.
    """

    def forced(place: int, id_: int, **fields: Any) -> Token | None:
        request = request_for(prompt[:place]) | {"stream": False, "logit_bias": [[id_, BIAS]], **fields}
        return next(stream(request, cancelled), None)

    tokens = [Token(prompt[0])]
    for place, id_ in enumerate(prompt[1:], start=1):
        token = forced(place, id_)
        if token is not None and token.logprob is None:
            # no probabilities are reported of an incomplete character: read all of them beside a complete one
            other = tokenizer.byte_token_id(COMPLETE_CHARACTER)
            token = forced(place, other, n_probs=tokenizer.size)
            if token is not None:
                token = Token(id_, dict(token.top)[id_], token.top)
        if token is None or (cancelled and cancelled.is_set()):
            break
        tokens.append(token)
    return tokens
