"""Memory of continuous batching on a GPU: as transformers counts it, and checked before the weights are read."""

import pytest
import torch
from dimensions import CHATGLM3_6B
from transformers import ContinuousBatchingConfig, GlmConfig
from transformers.generation.continuous_batching import cache as library

from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers import continuous_batching, engine
from entrypoints.engines.transformers.batching_memory import (
    CUDA_CONTEXT_BYTES,
    GPU_BATCH_TOKENS,
    PAGE_TOKENS,
    batching_bytes,
    fitting_slots,
    page_count,
)
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.errors import UserError
from entrypoints.hardware.gpus import Gpu
from entrypoints.hardware.placement import Placement, weight_bytes


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("slots", [2, 4, 19])
def test_the_bytes_are_those_that_transformers_counts(attention, slots, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library.PagedAttentionMemoryHandler, "get_available_memory", lambda self: 1 << 50)
    page_bytes = PAGE_TOKENS * 28 * 2 * 2 * 128 * 2
    config = GlmConfig(**CHATGLM3_6B.native_config("float16", (2,), 0), attn_implementation=attention)
    handler = library.PagedAttentionMemoryHandler(
        config=config,
        cb_config=ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=page_count(8192, slots),
            max_batch_tokens=GPU_BATCH_TOKENS,
            max_requests_per_batch=slots,
            max_blocks_per_request=0,
            use_async_batching=False,
        ),
        dtype=torch.float16,
        bytes_per_sector=page_bytes,
        tokens_per_sector=PAGE_TOKENS,
        bytes_per_block=page_bytes,
        attn_types=["full_attention"],
        model_supports_logits_to_keep=True,
    )
    expected = handler.compute_memory_footprint(*handler.infer_max_batch_tokens_and_num_sectors())
    assert batching_bytes(CHATGLM3_6B, slots, 2, attention != "sdpa") == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("gigabytes", "slots"), [(14, 0), (16, 4), (24, 20), (80, 130)])
def test_full_contexts_of_the_6b_on_a_card(gigabytes, slots):
    free = gigabytes * 10**9 - weight_bytes(CHATGLM3_6B, 2) - CUDA_CONTEXT_BYTES
    assert fitting_slots(CHATGLM3_6B, free) == slots


def test_slots_that_do_not_fit_are_rejected_before_loading_and_the_remedy_is_accepted(
    toy_native, monkeypatch: pytest.MonkeyPatch
):
    loaded = []
    placement = Placement({"": "cuda:0"}, torch.float16)
    monkeypatch.setattr(engine, "choose_placement", lambda *args, **kwargs: placement)
    monkeypatch.setattr(engine, "load_model", lambda *args: loaded.append(args))
    gpu = Gpu("Pretended", 2 * 10**9, 10**9 + 10**8, (7, 5))
    monkeypatch.setattr(continuous_batching, "list_gpus", lambda: [gpu])
    with pytest.raises(UserError, match=r"--slots 300 of 1024 tokens need .* are free; use --slots \d+") as error:
        TransformersEngine.load(toy_native, EngineOptions(slots=300))
    assert not loaded
    accepted = int(error.value.remedy.split()[2].rstrip(","))
    assert accepted > 1
    continuous_batching.check_batching_memory(_config(toy_native), accepted, placement)
    with pytest.raises(UserError):
        continuous_batching.check_batching_memory(_config(toy_native), accepted + 1, placement)


def _config(folder) -> ModelConfig:
    from entrypoints.checkpoint.native import open_native

    return open_native(folder).model_config
