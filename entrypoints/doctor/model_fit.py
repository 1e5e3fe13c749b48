"""Which formats of a model fit in how much memory, calculated from its config."""

from dataclasses import dataclass

from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.doctor import capacity
from entrypoints.engines.llamacpp.engine import needed_bytes
from entrypoints.engines.transformers.batching_memory import CUDA_CONTEXT_BYTES, fitting_slots
from entrypoints.engines.vllm.gpu_settings import ONLINE_QUANTIZATION_CAPABILITY
from entrypoints.hardware.cards import Card
from entrypoints.hardware.placement import MEMORY_HEADROOM_FACTOR, quantized_weight_bytes, weight_bytes
from entrypoints.quantization.tensor_types import plan_tensor_types
from entrypoints.settings import LOAD_IN_BITS
from entrypoints.sizes import format_size

GB = 10**9
HOST_MEMORY_GB = (8, 16, 32, 64)
GPU_MEMORY_GB = (6, 8, 16, 24, 80)
SYSTEM_BYTES = 2 * GB  # of the host's memory, for all other processes
GGUF_TYPES_BY_QUALITY = ("q8_0", "q5_k_m", "q4_k_m", "q4_0")  # best first; f16 is slower and hardly better than q8_0
DTYPE_BYTES = (("float32", 4), ("bfloat16", 2))


@dataclass(frozen=True)
class MemoryOption:
    """A size of memory, and the formats that fit in it, best first."""

    gigabytes: int
    formats: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join(self.formats) or "not enough for this model"


def file_memory_bytes(model_config: ModelConfig, type_: str) -> int:
    """Bytes that llama.cpp needs for a GGUF file of this type with one slot of the full context length."""
    return needed_bytes(
        model_config,
        sum(plan.size for plan in plan_tensor_types(model_config, type_)),
        slots=1,
        context_length=model_config.context_length,
    )


def host_memory_options(model_config: ModelConfig) -> list[MemoryOption]:
    """For hosts without a GPU: GGUF types, and the folder in transformers."""
    return [MemoryOption(size, fitting_formats(model_config, size * GB - SYSTEM_BYTES)) for size in HOST_MEMORY_GB]


def fitting_formats(model_config: ModelConfig, available: int) -> tuple[str, ...]:
    """The same for `available` bytes."""
    needs = {type_: file_memory_bytes(model_config, type_) for type_ in GGUF_TYPES_BY_QUALITY}
    for name, itemsize in DTYPE_BYTES:
        needs[f"the folder in {name}"] = int(weight_bytes(model_config, itemsize) * MEMORY_HEADROOM_FACTOR)
    return tuple(f"{name} ({format_size(needed)})" for name, needed in needs.items() if needed <= available)


def gpu_memory_options(model_config: ModelConfig) -> list[MemoryOption]:
    """For one GPU: the precisions in which the folder fits, and how many KV caches of full length fit beside it."""
    cache = model_config.kv_cache_bytes(model_config.context_length)
    stored = {"16 bits": weight_bytes(model_config, 2)}
    stored |= {f"--load-in {load_in}": quantized_weight_bytes(model_config, load_in, 2) for load_in in LOAD_IN_BITS}
    options = []
    for size in GPU_MEMORY_GB:
        caches = {
            name: (size * GB - CUDA_CONTEXT_BYTES - int(needed * MEMORY_HEADROOM_FACTOR)) // cache
            for name, needed in stored.items()
        }
        caches["16 bits"] = fitting_slots(model_config, size * GB - CUDA_CONTEXT_BYTES - stored["16 bits"])
        formats = tuple(f"{name} ({count} full contexts)" for name, count in caches.items() if count > 0)
        options.append(MemoryOption(size, formats))
    return options


@dataclass(frozen=True)
class ServingOption:
    """An engine and a precision that fit on a card, and how many requests run at once there."""

    engine: str
    load_in: str | None
    requests: dict[int, int]  # tokens of a request, prompt and answer together -> requests whose KV cache fits

    def __str__(self) -> str:
        stored = f"--load-in {self.load_in}" if self.load_in else "16 bits"
        counts = [f"{count} of {tokens:,} tokens" for tokens, count in self.requests.items()]
        return f"{stored}; requests at once: {' or '.join(counts)}"

    @property
    def slots(self) -> int:
        """For --slots: vLLM shares its cache among the requests; transformers reserves a full context for each."""
        counts = [*self.requests.values()]
        return min(capacity.SLOTS, counts[-1] if self.engine == "vllm" else counts[0])

    def command(self, model: str) -> str:
        """The command that serves with this option."""
        load_in = f" --load-in {self.load_in}" if self.load_in else ""
        return f"glm serve --model {model} --engine {self.engine}{load_in} --slots {self.slots}"


def serving_options(model_config: ModelConfig, card: Card) -> list[ServingOption]:
    """What fits on one card with at least one full context, best first: vLLM, which is faster, then transformers."""
    load = capacity.Load()
    lengths = sorted({model_config.context_length, min(4096, model_config.context_length)}, reverse=True)
    if (usual := int(load.prompt + load.answer)) < lengths[-1]:
        lengths.append(usual)
    cache = model_config.kv_cache_bytes(1)
    found = []
    for engine, load_in in (("vllm", None), ("vllm", "8bit"), ("transformers", None), *_transformers_load_in()):
        if engine == "vllm" and load_in and card.capability < ONLINE_QUANTIZATION_CAPABILITY:
            continue
        weights = quantized_weight_bytes(model_config, load_in, 2) if load_in else weight_bytes(model_config, 2)
        if engine == "vllm":
            free = capacity.MEMORY_FRACTION * card.memory - capacity.ACTIVATION_BYTES - weights
        else:
            free = card.memory - CUDA_CONTEXT_BYTES - weights * MEMORY_HEADROOM_FACTOR
        if engine == "transformers" and not load_in:
            slots = fitting_slots(model_config, card.memory - CUDA_CONTEXT_BYTES - weights)
            found += [ServingOption(engine, load_in, {model_config.context_length: slots})] if slots else []
        elif free >= cache * model_config.context_length:
            found.append(ServingOption(engine, load_in, {tokens: int(free / (cache * tokens)) for tokens in lengths}))
    return found


def _transformers_load_in() -> list[tuple[str, str]]:
    return [("transformers", load_in) for load_in in LOAD_IN_BITS]
