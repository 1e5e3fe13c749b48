"""The formats that `glm doctor` recommends for ChatGLM3-6B."""

import pytest

from entrypoints.checkpoint.gguf_reader import open_gguf
from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.doctor.checks import MIN_MEMORY_BYTES
from entrypoints.doctor.model_fit import (
    GB,
    GGUF_TYPES_BY_QUALITY,
    GPU_MEMORY_GB,
    HOST_MEMORY_GB,
    file_memory_bytes,
    fitting_formats,
    gpu_memory_options,
    host_memory_options,
    serving_options,
)
from entrypoints.engines.llamacpp import engine
from entrypoints.engines.llamacpp.engine import RUNTIME_BYTES, LlamaCppEngine, needed_bytes
from entrypoints.engines.options import EngineOptions
from entrypoints.errors import UserError
from entrypoints.hardware.cards import parse_card
from entrypoints.quantization.tensor_types import plan_tensor_types

CHATGLM3_6B = ModelConfig(28, 4096, 32, 2, 128, 13696, 65024, 8192, 1e-5, 1)  # config.json of chatglm3-6b
KV_CACHE_BYTES = 8192 * 28 * 2 * 2 * 128 * 2  # tokens, layers, keys and values, groups, head_dim, bytes
EMBEDDING_BYTES = 65024 * 4096 * 2  # ids, hidden, bytes


def test_each_size_of_host_memory_lists_the_fitting_formats_best_first():
    names = {
        option.gigabytes: [text.rpartition(" (")[0] for text in option.formats]
        for option in host_memory_options(CHATGLM3_6B)
    }
    files = ["q8_0", "q5_k_m", "q4_k_m", "q4_0"]
    assert tuple(names) == HOST_MEMORY_GB
    assert names[8] == files[1:]
    assert names[16] == [*files, "the folder in bfloat16"]
    assert names[32] == names[64] == [*files, "the folder in float32", "the folder in bfloat16"]


@pytest.mark.parametrize(("free", "first"), [(4 * GB, None), (5 * GB, "q4_0 (4.8 GB)"), (100 * GB, "q8_0 (7.7 GB)")])
def test_the_formats_for_this_machine_follow_its_available_memory(free, first):
    assert next(iter(fitting_formats(CHATGLM3_6B, free)), None) == first


def test_each_size_of_gpu_lists_the_precisions_in_which_the_folder_fits():
    options = {option.gigabytes: option.formats for option in gpu_memory_options(CHATGLM3_6B)}
    precisions = {size: [text.rpartition(" (")[0] for text in formats] for size, formats in options.items()}
    assert tuple(precisions) == GPU_MEMORY_GB
    assert precisions[6] == ["--load-in 4bit"]
    assert precisions[16] == precisions[24] == precisions[80] == ["16 bits", "--load-in 8bit", "--load-in 4bit"]
    assert options[16][0] == "16 bits (4 full contexts)"
    assert options[80][0] == "16 bits (130 full contexts)"


@pytest.mark.parametrize("type_", GGUF_TYPES_BY_QUALITY)
def test_the_memory_of_a_file_includes_a_slot_the_prompt_cache_and_a_second_embedding(type_):
    weights = sum(plan.size for plan in plan_tensor_types(CHATGLM3_6B, type_))
    assert file_memory_bytes(CHATGLM3_6B, type_) == weights + 2 * KV_CACHE_BYTES + EMBEDDING_BYTES + RUNTIME_BYTES


def test_loading_requires_the_memory_that_the_table_states(toy_gguf, monkeypatch):
    """One calculation: what fits according to doctor is loaded, anything else is rejected."""
    checkpoint = open_gguf(toy_gguf)
    needed = needed_bytes(checkpoint.model_config, toy_gguf.stat().st_size, 1, 1024)
    monkeypatch.setattr(engine, "available_memory", lambda: needed)
    engine.require_memory(checkpoint, 1)
    with pytest.raises(UserError, match=r"toy\.gguf with --slots 2 of 1024 tokens needs \d+\.\d MB of memory"):
        engine.require_memory(checkpoint, 2)
    monkeypatch.setattr(engine, "available_memory", lambda: needed - 1)
    with pytest.raises(UserError, match="fewer slots or a smaller type, or --context-length 768"):
        LlamaCppEngine.load(toy_gguf, EngineOptions(slots=1))
    LlamaCppEngine.load(toy_gguf, EngineOptions(slots=1, context_length=768)).close()
    monkeypatch.setattr(engine, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"fewer slots or a smaller type$"):
        engine.require_memory(checkpoint, 1)


def test_a_further_slot_takes_one_kv_cache_and_a_mapped_file_takes_no_memory():
    sums = [needed_bytes(CHATGLM3_6B, 10**9, slots, 8192) for slots in (1, 4)]
    assert sums[1] - sums[0] == 3 * KV_CACHE_BYTES
    assert needed_bytes(CHATGLM3_6B, 10**9, 1, 8192, use_mmap=True) == 2 * KV_CACHE_BYTES + RUNTIME_BYTES


def test_the_recommended_memory_includes_the_process_around_the_smallest_file():
    assert 0.3e9 < MIN_MEMORY_BYTES - file_memory_bytes(CHATGLM3_6B, "q4_0") < 0.4e9


@pytest.mark.parametrize(
    ("card", "best"),
    [
        ("6", "transformers 4bit"), ("12", "vllm 8bit"), ("V100 16G", "transformers None"), ("T4", "vllm 8bit"),
        ("24", "vllm None"), ("H100", "vllm None"),
    ],
)  # fmt: skip
def test_the_best_option_on_a_gpu_is_vllm_where_it_fits_else_transformers(card, best):
    options = serving_options(CHATGLM3_6B, parse_card(card))
    assert f"{options[0].engine} {options[0].load_in}" == best
    assert all(count >= 1 for option in options for count in option.requests.values())


def test_the_requests_at_once_are_the_rest_of_the_memory_by_their_kv_cache():
    """24 GB x 0.9 - 2 GB - 12.49 GB of weights, and 28 KiB for each token."""
    option = serving_options(CHATGLM3_6B, parse_card("24"))[0]
    rest = 24e9 * 0.9 - 2e9 - 2 * 6_243_584_000
    assert option.requests == {tokens: int(rest / (tokens * 28 * 1024)) for tokens in (8192, 4096, 1050)}
    assert option.command("models/mine") == "glm serve --model models/mine --engine vllm --slots 64"


def test_transformers_gets_no_more_slots_than_full_contexts_fit():
    """It reserves a full context for each slot, where vLLM shares its cache."""
    option = next(each for each in serving_options(CHATGLM3_6B, parse_card("16")) if each.engine == "transformers")
    assert option.load_in is None
    assert option.slots == option.requests[8192] == 4  # as `test_batching_memory.py` counts with the library


def test_nothing_fits_on_a_gpu_of_4_gb():
    assert serving_options(CHATGLM3_6B, parse_card("4")) == []
