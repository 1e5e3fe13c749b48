"""config.json cannot select the attention code: transformers would download and run a kernel that it names."""

import json
import shutil

import pytest
import torch
from transformers import PreTrainedModel

from entrypoints.checkpoint.native import open_native
from entrypoints.engines.options import EngineOptions
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.quantization.layerwise_forward import LayerwiseModel
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.methods import trainable_model
from entrypoints.training.methods.attention import TRAINING_ATTENTION

KERNEL = "evil/attention-kernel"


@pytest.fixture(params=["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def folder(request, toy_native, tmp_path, monkeypatch):
    """A model whose config.json names a kernel repository; loading fails if transformers is given that name."""
    folder = shutil.copytree(toy_native, tmp_path / "native")
    (folder / "manifest.json").unlink()
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {request.param: KERNEL}))
    check = PreTrainedModel._check_and_adjust_attn_implementation

    def checked(self, attn_implementation, *args, **kwargs):
        assert attn_implementation in ("sdpa", TRAINING_ATTENTION)
        return check(self, attn_implementation, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", checked)
    return folder


def test_the_engine_uses_the_attention_of_pytorch(folder, toy_engine):
    engine = TransformersEngine.load(folder, EngineOptions(device="cpu", dtype="float32"))
    assert engine.model.config._attn_implementation == "sdpa"


def test_training_uses_its_own_attention(folder, tmp_path):
    arguments = TrainArguments(folder, tmp_path / "rows", tmp_path / "out", method="freeze")
    model = trainable_model.load(arguments, open_native(folder).model_config, torch.float32)
    assert model.config._attn_implementation == TRAINING_ATTENTION


def test_the_layerwise_forward_pass_uses_the_attention_of_pytorch(folder):
    assert LayerwiseModel(open_native(folder))._config._attn_implementation == "sdpa"
