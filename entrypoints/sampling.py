"""How the next token is chosen: the parameters, their defaults and their bounds."""

from dataclasses import dataclass

from entrypoints.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """One request's parameters; temperature and top_p default to those of ChatGLM3's own chat().

    Raises UserError naming every field outside its bounds.
    """

    max_new_tokens: int = 2048
    temperature: float = 0.8  # 0: always the likeliest token
    top_p: float = 0.8
    top_k: int | None = None  # None: no such limit
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None  # None: another answer each time
    top_logprobs: int | None = None  # None: no log probabilities; 0: only the chosen token's
    json_schema: dict | None = None  # the answer must be JSON of this schema; {} for any object

    @property
    def greedy(self) -> bool:
        """Always the likeliest token? Scores divided by less than this would leave the range of floats."""
        return self.temperature < 1e-4

    def __post_init__(self) -> None:
        bounds = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature <= 2, "0 to 2"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "repetition_penalty": (0 < self.repetition_penalty <= 2, "above 0, at most 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "-2 to 2"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "-2 to 2"),
            "seed": (self.seed is None or -(2**63) <= self.seed < 2**63, "a whole number of 64 bits"),
            "top_logprobs": (self.top_logprobs is None or 0 <= self.top_logprobs <= 20, "0 to 20"),
        }
        wrong = {name: words for name, (fine, words) in bounds.items() if not fine}
        if wrong:
            values = ", ".join(f"{name}={getattr(self, name)}" for name in wrong)
            raise UserError(
                f"out of bounds: {values}", ", ".join(f"{name} is {words}" for name, words in wrong.items())
            )
