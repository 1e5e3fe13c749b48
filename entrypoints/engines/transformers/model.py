"""Loads a native folder as a transformers model, and adds adapters to it."""

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

from transformers import GenerationConfig, GlmConfig, GlmForCausalLM
from transformers.utils import logging as transformers_logging

from entrypoints.checkpoint.adapters import Adapter
from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.checkpoint.tensor_files import read_json
from entrypoints.engines.transformers.prefix_model import PrefixedGlm, change_class
from entrypoints.hardware.placement import Placement, bitsandbytes_config, limit_torch_threads
from entrypoints.settings import LOAD_IN_BITS

logger = logging.getLogger(__name__)
ATTENTION = "sdpa"  # PyTorch's own


def read_model_config(folder: Path) -> GlmConfig:
    """The configuration of a native folder, from the fields that this package writes and checks.

    transformers acts on others: `attn_implementation` can name a kernel to download from a hub and run, `num_labels`
    allocates. Raises UserError as `ModelConfig.from_native`.
    """
    file = folder / "config.json"
    stored = read_json(file)
    known = ModelConfig.from_native(stored, file, quantized=True).native_config("float32", (), 0)
    fields = {name: stored[name] for name in (*known, "quantization_config") if name in stored}
    return GlmConfig(**fields | {"attn_implementation": ATTENTION})


def load_model(folder: Path, placement: Placement, load_in: str | None) -> GlmForCausalLM:
    """The model of a native folder; `load_in`: precision of the linear layers, in the files or while loading."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers: untyped
    limit_torch_threads()
    config = read_model_config(folder)
    quantization = bitsandbytes_config(LOAD_IN_BITS[load_in], placement.dtype) if load_in else None
    if quantization and hasattr(config, "quantization_config"):
        # The files are quantized. transformers would ignore a second configuration passed beside theirs.
        config.quantization_config, quantization = quantization.to_dict(), None
    if load_in:  # it warns for every matrix and token that the inputs are cast
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return GlmForCausalLM.from_pretrained(
        folder,
        config=config,
        attn_implementation=ATTENTION,
        dtype=placement.dtype,
        device_map=placement.device_map,
        generation_config=no_generation_config(),
        local_files_only=True,
        quantization_config=quantization,
    )


def no_generation_config() -> GenerationConfig:
    """Passed to `from_pretrained`, it keeps generation_config.json of a folder unread: requests have all settings."""
    return GenerationConfig()  # type: ignore[no-untyped-call]  # transformers: untyped


def add_adapter(model: GlmForCausalLM, adapter: Adapter) -> GlmForCausalLM:
    """A model with the adapter on the same weights; the given model is unchanged."""
    logger.info("adding adapter %s", adapter.folder)
    adapted = with_shared_weights(model)
    if adapter.pre_seq_len is not None:
        change_class(adapted, PrefixedGlm)
        adapted.prefix = adapter.prefix()  # (2 * layers, kv_heads, prefix length, head_dim)
        return adapted
    from peft import LoraConfig, PeftModel

    # not read by PEFT, which acts on fields that were not checked
    config = LoraConfig(**adapter.peft_config(), inference_mode=True)
    # a PeftModel has no common base class with the model that it wraps, but it delegates every attribute to it
    with without_peft_warning():
        return PeftModel.from_pretrained(adapted, adapter.folder, config=config)  # type: ignore[return-value]


@contextlib.contextmanager
def without_peft_warning() -> Iterator[None]:
    """PEFT uses an attribute of transformers that is deprecated, each time it wraps a model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        yield


def with_shared_weights(model: GlmForCausalLM) -> GlmForCausalLM:
    """A second model object on the same tensors: its settings and wrappers can change without affecting the first."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
