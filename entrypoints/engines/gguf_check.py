"""Is a quantised model still its source? Its own greedy answers, read by the source: same choices, near odds."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from entrypoints.checkpoint.adapters import Adapter
from entrypoints.checkpoint.native import NativeCheckpoint
from entrypoints.engines.base import Token
from entrypoints.engines.layerwise import Layerwise
from entrypoints.engines.llamacpp_engine import LlamaCppEngine
from entrypoints.engines.transformers_engine import TransformersEngine
from entrypoints.errors import UserError
from entrypoints.prompt import Message
from entrypoints.sampling import Sampling

logger = logging.getLogger(__name__)
QUESTIONS = ("你好", "你是谁", "类型#裙*颜色#蓝色*风格#简约", "Write a haiku about the sea.", "1+1等于几？")
ANSWER_TOKENS = 16
LIKELIEST = 1000  # compared one by one, all others as one; more say little and take llama.cpp long to tell
# Mean Kullback-Leibler divergence in nats that a model may have: many times what the demo's toy showed, far below what
# a wrong tensor, rope or scale does.
BOUNDS = {"f16": 0.01, "q8_0": 0.02, "q5_k_m": 0.1, "q4_k_m": 0.25, "q4_0": 0.4, "int8": 0.1, "nf4": 0.4}
MERGED_APART = 1e-3  # of the largest logit: sums in another order, in float32


@dataclass(frozen=True)
class Comparison:
    """A quantised model against its source, at every token of some greedy answers."""

    divergence: float  # mean KL(source, quantised) in nats
    same: int  # tokens that the source would have chosen too
    tokens: int

    def __str__(self) -> str:
        return f"mean KL {self.divergence:.5f}, {self.same} of {self.tokens} greedy tokens as the source"


def compare(file: Path, checkpoint: NativeCheckpoint, adapter: Adapter | None = None) -> Comparison:
    """Load the file in llama.cpp, let it answer, and read prompts and answers with the source (and LoRA)."""
    engine = LlamaCppEngine.load(file, slots=1, window=min(512, checkpoint.shape.window), in_place=True)
    try:
        prompts = [engine.prompt_format.encode([Message("user", text)], engine.tokenizer) for text in QUESTIONS]
        answers = [_told(engine.greedy(prompt, ANSWER_TOKENS, LIKELIEST)) for prompt in prompts]
    finally:
        engine.close()
    read = [[*prompt, *map(int, answer[:-1])] for prompt, answer in zip(prompts, answers, strict=True)]
    source = Layerwise(checkpoint, adapter, beside=True)
    hidden = [state[len(prompt) - 1 :] for state, prompt in zip(source.hidden(read), prompts, strict=True)]
    same, divergences = 0, []
    for answer, logits in zip(answers, source.logits(hidden), strict=True):
        same += sum(int(row.argmax()) == token for row, token in zip(logits, answer, strict=True))
        divergences += [
            _divergence(row, token) for row, token in zip(logits, answer, strict=True) if token.logprob is not None
        ]
    return Comparison(sum(divergences) / len(divergences), same, sum(map(len, answers)))


@torch.inference_mode()
def compare_folder(folder: Path, checkpoint: NativeCheckpoint) -> Comparison:
    """The same for a folder in fewer bits, in transformers on the processor; all of its odds are compared."""
    engine = TransformersEngine.load(folder, device="cpu")
    prompts = [engine.prompt_format.encode([Message("user", text)], engine.tokenizer) for text in QUESTIONS]
    greedy = Sampling(max_new_tokens=ANSWER_TOKENS, temperature=0)
    read = [[*prompt, *engine.generate(prompt, greedy)] for prompt in prompts]
    theirs = [engine.model(input_ids=torch.tensor([ids])).logits[0] for ids in read]
    del engine
    source = Layerwise(checkpoint)
    starts = [len(prompt) - 1 for prompt in prompts]
    hidden = [state[start:] for state, start in zip(source.hidden(read), starts, strict=True)]
    ours = torch.cat(source.logits(hidden)).double().log_softmax(-1)
    theirs = torch.cat([rows[start:] for rows, start in zip(theirs, starts, strict=True)]).double().log_softmax(-1)
    divergence = float((ours.exp() * (ours - theirs)).sum(-1).mean())
    return Comparison(divergence, int((ours.argmax(-1) == theirs.argmax(-1)).sum()), len(ours))


def require_near(found: Comparison, type_: str) -> None:
    """Raise UserError when a model is further from its source than its type explains; type_: one of BOUNDS."""
    if not found.divergence <= BOUNDS[type_]:  # NaN is not
        raise UserError(
            f"the {type_} model is not its source: {found}, the bound is {BOUNDS[type_]}",
            "use a type with more bits, and check the source's weights",
        )


def require_merged(checkpoint: NativeCheckpoint, adapter: Adapter) -> None:
    """Raise UserError unless the merged weights give the logits of the base and the LoRA beside it."""
    tokenizer = checkpoint.tokenizer
    prompts = [adapter.prompt_format.encode([Message("user", text)], tokenizer) for text in QUESTIONS[:3]]
    logits = []
    for beside in (False, True):  # the first refuses a prefix
        run = Layerwise(checkpoint, adapter, beside)
        logits.append(torch.cat(run.logits(run.hidden(prompts))))
    apart = ((logits[0] - logits[1]).abs().max() / logits[0].abs().max()).item()
    logger.info("logits of the merged model and of base and LoRA: %.1e apart, of the largest", apart)
    if not apart <= MERGED_APART:
        raise UserError(
            f"merging {adapter.folder} moves the logits by {apart:.1e} of the largest",
            "serve the LoRA beside its base with --adapter",
        )


def _told(tokens: list[Token]) -> list[Token]:
    """Without what llama.cpp did not tell at the end: the bytes of half a character."""
    while len(tokens) > 1 and tokens[-1].logprob is None:
        tokens.pop()
    return tokens


def _divergence(logits: torch.Tensor, token: Token) -> float:
    """KL(source, file) over the file's likeliest tokens, and all others as one."""
    ids, theirs = zip(*token.top, strict=True)
    ours, theirs = logits.double().log_softmax(-1)[list(ids)], torch.tensor(theirs, dtype=torch.float64)
    if len(ids) < len(logits):
        ours, theirs = (torch.cat([known, _rest(known)]) for known in (ours, theirs))
    return float((ours.exp() * (ours - theirs)).sum())


def _rest(known: torch.Tensor) -> torch.Tensor:
    return (1 - known.exp().sum()).clamp(min=1e-6).log()[None]
