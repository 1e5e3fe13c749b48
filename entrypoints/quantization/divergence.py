"""How far a quantized model is from its source checkpoint: KL divergence and agreement on its own greedy answers.

The quantized model answers a few fixed prompts. The source then computes its probabilities for the same tokens.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from entrypoints.chat_format.prompt import Message
from entrypoints.chat_format.sampling import Sampling
from entrypoints.checkpoint.adapters import Adapter
from entrypoints.checkpoint.native import NativeCheckpoint
from entrypoints.engines.base import Engine, Token
from entrypoints.engines.llamacpp.engine import LlamaCppEngine
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.errors import UserError
from entrypoints.quantization.layerwise_forward import LayerwiseModel

logger = logging.getLogger(__name__)
PROMPTS = ("你好", "你是谁", "类型#裙*颜色#蓝色*风格#简约", "Write a haiku about the sea.", "1+1等于几？")
ANSWER_TOKENS = 16
TOP_TOKENS = 1000  # compared one by one, the rest as one class; more tokens change little and slow llama.cpp down
CONTEXT_LENGTH = 512
# Upper limits of the mean Kullback-Leibler divergence, in nats: many times what the demo model shows, far below what a
# wrong tensor, rotary embedding or scale causes.
MAX_MEAN_KL = {"f16": 0.01, "q8_0": 0.02, "q5_k_m": 0.1, "q4_k_m": 0.25, "q4_0": 0.4, "int8": 0.1, "nf4": 0.4}


@dataclass(frozen=True)
class DivergenceResult:
    """A quantized model compared with its source at every token of some greedy answers."""

    mean_kl: float  # KL(source || quantized) in nats
    matching_tokens: int  # tokens that the source would have chosen too
    tokens: int

    def __str__(self) -> str:
        return f"mean KL {self.mean_kl:.5f}, {self.matching_tokens} of {self.tokens} greedy tokens match the source"


def measure_file(file: Path, checkpoint: NativeCheckpoint, adapter: Adapter | None = None) -> DivergenceResult:
    """Compare a GGUF file, answering in llama.cpp, with its source and the LoRA that was merged."""
    context_length = min(CONTEXT_LENGTH, checkpoint.model_config.context_length)
    engine = LlamaCppEngine.load(file, EngineOptions(context_length=context_length, use_mmap=True))
    try:
        prompts = _encode_prompts(engine)
        answers = [
            _drop_incomplete_character(engine.generate_greedy(ids, ANSWER_TOKENS, TOP_TOKENS)) for ids in prompts
        ]
    finally:
        engine.close()
    sequences = [[*prompt, *map(int, answer[:-1])] for prompt, answer in zip(prompts, answers, strict=True)]
    source_logits = _logits_after_prompts(LayerwiseModel(checkpoint, by_peft=adapter), sequences, prompts)
    matching, divergences = 0, []
    for answer, logits in zip(answers, source_logits, strict=True):  # T tokens, (T, V)
        for token, row in zip(answer, logits, strict=True):
            matching += int(row.argmax()) == token
            if token.logprob is not None:
                divergences.append(_kl_divergence(row, token))
    return DivergenceResult(sum(divergences) / len(divergences), matching, sum(map(len, answers)))


@torch.inference_mode()
def measure_folder(folder: Path, checkpoint: NativeCheckpoint) -> DivergenceResult:
    """Compare a bitsandbytes folder, answering in transformers on the CPU, with its source; uses the full logits."""
    engine = TransformersEngine.load(folder, EngineOptions(device="cpu"))
    prompts = _encode_prompts(engine)
    greedy = Sampling(max_new_tokens=ANSWER_TOKENS, temperature=0)
    sequences = [[*prompt, *engine.generate(prompt, greedy)] for prompt in prompts]
    logits = [
        engine.model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 :]  # (T, V) of each answer
        for ids, prompt in zip(sequences, prompts, strict=True)
    ]
    del engine
    source_logits = _logits_after_prompts(LayerwiseModel(checkpoint), sequences, prompts)
    source = torch.cat(source_logits).double().log_softmax(-1)  # (sum of T, V)
    quantized = torch.cat(logits).double().log_softmax(-1)
    mean_kl = float((source.exp() * (source - quantized)).sum(-1).mean())
    matching = int((source.argmax(-1) == quantized.argmax(-1)).sum())
    return DivergenceResult(mean_kl, matching, len(source))


def require_small_divergence(result: DivergenceResult, type_: str) -> None:
    """Raise UserError if the mean KL exceeds the limit of its type; type_: a key of MAX_MEAN_KL."""
    if not result.mean_kl <= MAX_MEAN_KL[type_]:  # also true for NaN
        raise UserError(
            f"the {type_} model differs too much from its source: {result}; the limit is {MAX_MEAN_KL[type_]}",
            "use a type with more bits, and check the source's weights",
        )


def _encode_prompts(engine: Engine) -> list[list[int]]:
    return [engine.prompt_format.encode([Message("user", text)], engine.tokenizer) for text in PROMPTS]


def _logits_after_prompts(
    model: LayerwiseModel, sequences: list[list[int]], prompts: list[list[int]]
) -> list[torch.Tensor]:
    """Logits (T, V) for the T tokens of each answer: from the prompt's last token on."""
    states = model.hidden_states(sequences)
    return model.logits([state[len(prompt) - 1 :] for state, prompt in zip(states, prompts, strict=True)])


def _drop_incomplete_character(tokens: list[Token]) -> list[Token]:
    """Remove trailing tokens for which llama.cpp reports no probabilities: the first bytes of a character."""
    while len(tokens) > 1 and tokens[-1].logprob is None:
        tokens.pop()
    return tokens


def _kl_divergence(logits: torch.Tensor, token: Token) -> float:
    """KL(source || quantized) of one position over the quantized model's top tokens, all others as one class.

    logits: the source's, (V,).
    """
    ids, top_logprobs = zip(*token.top, strict=True)
    source = logits.double().log_softmax(-1)[list(ids)]  # (TOP_TOKENS,)
    quantized = torch.tensor(top_logprobs, dtype=torch.float64)
    if len(ids) < len(logits):
        source, quantized = (torch.cat([top, _remaining_logprob(top)]) for top in (source, quantized))
    return float((source.exp() * (source - quantized)).sum())


def _remaining_logprob(logprobs: torch.Tensor) -> torch.Tensor:
    """Logarithm of the probability that `logprobs` (N,) leave, (1,)."""
    return (1 - logprobs.exp().sum()).clamp(min=1e-6).log()[None]
