"""Dimensions of a model that is not on this machine."""

import json
import shutil
from pathlib import Path

import pytest

from entrypoints.checkpoint.native import open_native
from entrypoints.errors import UserError
from entrypoints.hub.download import KNOWN_MODELS
from entrypoints.hub.model_dimensions import PUBLISHED, has_weights, read_dimensions


def test_every_model_that_can_be_downloaded_by_name_can_be_planned_by_name():
    assert [*PUBLISHED] == [*KNOWN_MODELS]
    assert len({*PUBLISHED.values()}) == 7


@pytest.mark.parametrize(
    ("name", "layers", "kv_heads", "context_length", "rope_ratio"),
    [  # num_layers, multi_query_group_num, seq_length and rope_ratio of the published config.json
        ("chatglm3-6b-32k", 28, 2, 32768, 50),
        ("chatglm3-6b-128k", 28, 2, 131072, 500),
        ("codegeex2-6b", 28, 2, 8192, 1),
        ("glm-4-9b", 40, 2, 8192, 1),
        ("glm-4-9b-chat", 40, 2, 131072, 500),
        ("glm-4-9b-chat-1m-hf", 40, 4, 1048576, 10000),
    ],
)
def test_the_variants_differ_in_cache_and_context_length(name, layers, kv_heads, context_length, rope_ratio):
    known = PUBLISHED[f"THUDM/{name}"]
    numbers = (known.num_layers, known.num_kv_heads, known.context_length, known.rope_ratio)
    assert numbers == (layers, kv_heads, context_length, rope_ratio)
    assert known.kv_cache_bytes(1) == 2 * 2 * layers * kv_heads * 128  # keys and values in 16 bits


@pytest.mark.parametrize("name", ["THUDM/chatglm3-6b", "zai-org/chatglm3-6b", "ZhipuAI/chatglm3-6b", "chatglm3-6b"])
def test_a_name_may_have_any_of_the_organizations_or_none(name):
    assert read_dimensions(Path(name)) is PUBLISHED["THUDM/chatglm3-6b"]


def test_a_folder_with_only_config_json_suffices_in_either_layout(toy_native, toy_original, tmp_path):
    for folder in (toy_native, toy_original):
        copy = tmp_path / folder.name
        copy.mkdir()
        shutil.copy(folder / "config.json", copy)
        assert not has_weights(copy)
        assert has_weights(folder)
        assert read_dimensions(copy) == open_native(toy_native).model_config


@pytest.mark.parametrize("model", ["chatglm4", "other/chatglm3-6b", "models/missing"])
def test_an_unknown_name_is_an_error_that_lists_the_known_ones(model):
    with pytest.raises(UserError, match=r"neither a folder with config\.json nor .*THUDM/chatglm3-6b-128k"):
        read_dimensions(Path(model))


def test_a_config_of_another_model_is_rejected_by_its_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match=r"config\.json has model_type 'llama'"):
        read_dimensions(tmp_path)
