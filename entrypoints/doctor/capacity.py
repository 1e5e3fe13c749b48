"""Concurrent requests and users of one GPU that serves a model: an analytical model, not a measurement.

A decoding step generates one token for every running request. It reads all weights and the KV cache of each request, so
it takes bytes / (bandwidth x EFFICIENCY). Prefill takes 2 floating-point operations per parameter and token, in time
that decoding cannot use. Users send a request, pause, and send the next one; the number of running requests follows
from Little's law.
"""

import math
from dataclasses import dataclass

from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.hardware.cards import Card
from entrypoints.hardware.placement import weight_bytes

MEMORY_FRACTION, ACTIVATION_BYTES = 0.9, 2e9  # usable fraction of the GPU memory; reserved for activations
# of the bandwidth and arithmetic in the data sheet, an assumption; two CPU cores reached 0.33 and 0.92 (k8s/README.md)
EFFICIENCY = 0.5
SLOTS = 64  # --slots of k8s/components/vllm
MAX_LOAD = 0.7  # of slots and time, so that peaks and the restart of a replica are covered


@dataclass(frozen=True)
class Served:
    """What a GPU reads of a model: bytes of the weights as loaded, bytes of the KV cache per token, parameters."""

    weights: float
    cache_per_token: float
    parameters: float

    @classmethod
    def in_16_bits(cls, model_config: ModelConfig) -> "Served":
        """With weights and KV cache in float16 or bfloat16."""
        return cls(weight_bytes(model_config, 2), model_config.kv_cache_bytes(1), weight_bytes(model_config, 1))


@dataclass(frozen=True)
class Load:
    """Behavior of one user: tokens per prompt and answer, seconds between an answer and the next prompt."""

    prompt: float = 800
    answer: float = 250
    pause: float = 60
    speed: float = 20  # minimum tokens/s for each user


def concurrent_requests(card: Card, model: Served, tokens: float) -> int:
    """Requests of `tokens` tokens, prompt and answer together, whose KV cache fits next to the weights."""
    cache = MEMORY_FRACTION * card.memory - model.weights - ACTIVATION_BYTES
    return max(0, int(cache / (model.cache_per_token * tokens)))


def max_running(card: Card, model: Served, load: Load) -> int:
    """Requests of this load that fit, at most SLOTS."""
    return min(SLOTS, concurrent_requests(card, model, load.prompt + load.answer))


def step_seconds(card: Card, model: Served, load: Load, running: float) -> float:
    """Duration of a decoding step, which generates one token for every running request."""
    cache = running * model.cache_per_token * (load.prompt + load.answer / 2)
    return (model.weights + cache) / (card.bandwidth * EFFICIENCY)


def running_requests(card: Card, model: Served, load: Load, users: float) -> float:
    """Average number of running requests on one replica; infinity if it cannot keep up."""
    count = 1.0
    for _ in range(200):
        seconds = load.answer * step_seconds(card, model, load, count)
        rate = users / (load.pause + seconds)  # requests/s
        prefill = rate * load.prompt * 2 * model.parameters / (card.operations * EFFICIENCY)  # fraction of the time
        if prefill >= MAX_LOAD:
            return math.inf
        count = rate * seconds / (1 - prefill)
    return count


def users_per_replica(card: Card, model: Served, load: Load) -> int:
    """Largest number of users that get `speed` on one replica at a load of at most MAX_LOAD."""
    limit = MAX_LOAD * max_running(card, model, load)

    def can_serve(users: int) -> bool:
        count = running_requests(card, model, load, users)
        return count <= limit and 1 / step_seconds(card, model, load, count) >= load.speed

    low, high = 0, 1 << 20
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if can_serve(middle) else (low, middle)
    return low


def replicas(card: Card, model: Served, load: Load, users: int) -> int | None:
    """Replicas (GPUs) for this number of users, plus one spare if more than one is needed; None if impossible."""
    each = users_per_replica(card, model, load)
    needed = math.ceil(users / each) if each else None
    return needed + 1 if needed and needed > 1 else needed


def describe(load: Load) -> str:
    """The assumptions behind the numbers."""
    return (
        f"prompts of {load.prompt:.0f} tokens, answers of {load.answer:.0f}, a pause of {load.pause:.0f} s, --slots "
        f"{SLOTS}, {MAX_LOAD:.0%} load, {EFFICIENCY:.0%} of the data sheet's speed; not measured on a GPU"
    )
