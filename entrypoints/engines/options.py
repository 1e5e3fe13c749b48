"""Options for loading a model, common to all engines."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from entrypoints.errors import UserError

if TYPE_CHECKING:
    from entrypoints.checkpoint.gguf_reader import GgufCheckpoint
    from entrypoints.checkpoint.native import NativeCheckpoint

Checkpoint = TypeVar("Checkpoint", "NativeCheckpoint", "GgufCheckpoint")
DEFAULT_SLOTS = 4
GPU_SLOTS = 256  # of each copy with vLLM, which shares one KV cache: its own default for GPUs below 70 GiB
GPU_MEMORY_UTILIZATION = 0.9
PREFIX_CACHE_GB = 4


@dataclass(frozen=True)
class EngineOptions:
    """How to load a model. `check_engine_options` rejects options that the selected engine does not support."""

    engine: str = "auto"  # auto | transformers | llamacpp | vllm; auto: llamacpp for a GGUF file, else transformers
    adapter: Path | None = None  # LoRA or P-Tuning v2 adapter that every answer uses
    adapters: Mapping[str, Path] = field(default_factory=dict)  # adapters that each answer can select by name
    device: str = "auto"  # auto | cuda | mps | cpu
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16; a GGUF file has its own precision
    slots: int = 1  # answers generated concurrently
    verify: bool = False  # check the hash of every file before loading
    load_in: str | None = None  # 8bit | 4bit: quantize the weights of a folder while they load
    context_length: int | None = None  # tokens of a prompt and its answer together; None: the model's, the maximum

    # llamacpp and vllm
    speculative: bool = False  # prompt lookup: draft tokens that repeat the conversation; llamacpp: without logprobs

    # llamacpp only
    threads: int | None = None  # None: all CPUs available to the process
    prefix_cache: Path | None = None  # folder that keeps the KV caches of prompts over restarts
    prefix_cache_bytes: int = PREFIX_CACHE_GB * 10**9  # size limit of that folder
    use_mmap: bool = False  # map the weights from the file: the system may evict pages; low memory use, slow

    # vllm only
    tensor_parallel_size: int | None = None  # GPUs of each copy of the model; None: the fewest that hold it
    data_parallel_size: int | None = None  # copies of the model; None: as many as the GPUs hold
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION  # fraction of each GPU's memory for weights and KV cache
    enforce_eager: bool = False  # no compilation and no CUDA graphs: starts sooner, generates slower

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise UserError(f"--slots {self.slots} is below 1", "use 1 or more")

    @property
    def all_adapters(self) -> tuple[Path, ...]:
        """Folders of all adapters."""
        return (*((self.adapter,) if self.adapter else ()), *self.adapters.values())

    def limited(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with `context_length`; raises UserError if that is more than the model supports."""
        if self.context_length is None:
            return checkpoint
        longest = checkpoint.model_config.context_length
        if not 1 < self.context_length <= longest:
            raise UserError(
                f"--context-length {self.context_length}: the model has a context length of {longest}",
                f"use a number from 2 to {longest}",
            )
        return replace(checkpoint, model_config=replace(checkpoint.model_config, context_length=self.context_length))
