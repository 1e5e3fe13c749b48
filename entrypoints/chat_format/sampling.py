"""Sampling parameters: their defaults and bounds."""

from dataclasses import dataclass
from typing import Any

from entrypoints.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Parameters of one request; temperature and top_p default to those of the models' own chat().

    They are equal in modeling_chatglm.py of ChatGLM2, CodeGeeX2, ChatGLM3 and GLM-4, therefore no family has its own.
    Raises UserError: names every field outside its bounds.
    """

    max_new_tokens: int = 2048
    temperature: float = 0.8  # 0: greedy decoding
    top_p: float = 0.8  # 0: greedy decoding
    top_k: int | None = None  # None: no limit
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None  # None: a different answer each time
    top_logprobs: int | None = None  # None: no log probabilities; 0: only that of the chosen token
    json_schema: dict[str, Any] | None = None  # the answer is JSON that matches this schema; {}: any object
    grammar: str | None = None  # the answer matches this grammar in GBNF; it has no JSON schema then
    cache_salt: str = ""  # what the engine keeps of a prompt on disk is used only by requests with the same value

    @property
    def greedy(self) -> bool:
        """True for greedy decoding. Logits divided by a smaller temperature would overflow."""
        return self.temperature < 1e-4

    def __post_init__(self) -> None:
        bounds = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature <= 2, "from 0 to 2"),
            "top_p": (0 <= self.top_p <= 1, "from 0 to 1"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "repetition_penalty": (0 < self.repetition_penalty <= 2, "above 0 and at most 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "from -2 to 2"),
            "seed": (self.seed is None or -(2**63) <= self.seed < 2**63, "a 64-bit integer"),
            "top_logprobs": (self.top_logprobs is None or 0 <= self.top_logprobs <= 20, "from 0 to 20"),
        }
        wrong = {name: bound for name, (is_valid, bound) in bounds.items() if not is_valid}
        if wrong:
            values = ", ".join(f"{name}={getattr(self, name)}" for name in wrong)
            raise UserError(
                f"out of bounds: {values}", ", ".join(f"{name} must be {bound}" for name, bound in wrong.items())
            )
        if self.top_p == 0:  # only the most likely token, as at temperature 0; not every engine accepts it
            object.__setattr__(self, "temperature", 0.0)
            object.__setattr__(self, "top_p", 1.0)
