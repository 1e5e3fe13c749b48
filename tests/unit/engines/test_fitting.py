"""What `glm doctor` advises for ChatGLM3-6B."""

import pytest

from entrypoints.checkpoint.gguf import open_gguf
from entrypoints.checkpoint.gguf_plan import plans
from entrypoints.checkpoint.layout import Shape
from entrypoints.engines import llamacpp_engine
from entrypoints.engines.diagnosis import ENOUGH_MEMORY
from entrypoints.engines.fitting import (
    FILES,
    GB,
    GPU_SIZES,
    HOST_SIZES,
    file_memory,
    gpu_choices,
    here,
    host_choices,
)
from entrypoints.engines.llamacpp_engine import ROOM, LlamaCppEngine, needed_bytes
from entrypoints.errors import UserError

CHATGLM3_6B = Shape(28, 4096, 32, 2, 128, 13696, 65024, 8192, 1e-5, 1)  # config.json of chatglm3-6b
WINDOW = 8192 * 28 * 2 * 2 * 128 * 2  # tokens, layers, keys and values, groups, head_dim, bytes
EMBEDDING = 65024 * 4096 * 2  # ids, hidden, bytes


def test_each_size_of_host_memory_is_told_what_fits_the_nearest_first():
    names = {choice.gigabytes: [fit.rpartition(" (")[0] for fit in choice.fits] for choice in host_choices(CHATGLM3_6B)}
    files = ["q8_0", "q5_k_m", "q4_k_m", "q4_0"]
    assert tuple(names) == HOST_SIZES
    assert names[8] == files[1:]
    assert names[16] == [*files, "the folder in bfloat16"]
    assert names[32] == names[64] == [*files, "the folder in float32", "the folder in bfloat16"]


@pytest.mark.parametrize(("free", "first"), [(4 * GB, None), (5 * GB, "q4_0 (4.8 GB)"), (100 * GB, "q8_0 (7.7 GB)")])
def test_what_fits_this_machine_is_told_of_its_free_memory(free, first):
    assert next(iter(here(CHATGLM3_6B, free)), None) == first


def test_each_size_of_gpu_is_told_in_how_many_bits_the_folder_fits():
    choices = {choice.gigabytes: choice.fits for choice in gpu_choices(CHATGLM3_6B)}
    ways = {size: [fit.rpartition(" (")[0] for fit in fits] for size, fits in choices.items()}
    assert tuple(ways) == GPU_SIZES
    assert ways[6] == ["--load-in 4bit"]
    assert ways[16] == ways[24] == ways[80] == ["16 bits", "--load-in 8bit", "--load-in 4bit"]
    assert choices[16][0] == "16 bits (5 windows)"
    assert choices[80][0] == "16 bits (277 windows)"


@pytest.mark.parametrize("type_", FILES)
def test_the_memory_of_a_file_counts_one_window_the_shelf_and_a_second_embedding(type_):
    weights = sum(plan.size for plan in plans(CHATGLM3_6B, type_))
    assert file_memory(CHATGLM3_6B, type_) == weights + 2 * WINDOW + EMBEDDING + ROOM


def test_loading_asks_for_what_the_table_counts(toy_gguf, monkeypatch):
    """One sum: what doctor says fits is not refused, and what it says does not fit is."""
    checkpoint = open_gguf(toy_gguf)
    needed = needed_bytes(checkpoint.shape, toy_gguf.stat().st_size, 1, 1024)
    monkeypatch.setattr(llamacpp_engine, "available_memory", lambda: needed)
    llamacpp_engine.require_memory(checkpoint, 1, 1024)
    with pytest.raises(UserError, match=r"toy\.gguf with 2 slots of 1024 tokens needs 0\.0 GB of memory"):
        llamacpp_engine.require_memory(checkpoint, 2, 1024)
    monkeypatch.setattr(llamacpp_engine, "available_memory", lambda: needed - 1)
    with pytest.raises(UserError, match="fewer slots or a smaller type"):
        LlamaCppEngine.load(toy_gguf, slots=1)


def test_a_further_slot_takes_a_window_and_a_file_in_place_only_its_windows():
    sums = [needed_bytes(CHATGLM3_6B, 10**9, slots, 8192) for slots in (1, 4)]
    assert sums[1] - sums[0] == 3 * WINDOW
    assert needed_bytes(CHATGLM3_6B, 10**9, 1, 8192, in_place=True) == 2 * WINDOW + ROOM


def test_what_is_called_enough_memory_leaves_room_for_the_process_around_the_smallest_file():
    assert 0.3e9 < ENOUGH_MEMORY - file_memory(CHATGLM3_6B, "q4_0") < 0.4e9
