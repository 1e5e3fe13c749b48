"""Inputs that a conversion rejects, and what an interrupted conversion leaves behind."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.checkpoint.conversion import convert_to_native, convert_to_original
from entrypoints.checkpoint.native import open_native
from entrypoints.checkpoint.tensor_files import open_weight_files
from entrypoints.errors import UserError

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 32}
# config.json of THUDM/chatglm-6b, March 2023, its fields that describe the model
CHATGLM_6B = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "hidden_size": 4096,
    "inner_hidden_size": 16384,
    "layernorm_epsilon": 1e-05,
    "max_sequence_length": 2048,
    "num_attention_heads": 32,
    "num_layers": 28,
    "position_encoding_2d": True,
    "vocab_size": 130528,
}


@pytest.fixture
def source(toy_original, tmp_path):
    """A copy of the original tiny model that a test may damage."""
    return shutil.copytree(toy_original, tmp_path / "in" / "source")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out" / "native"


def edit(folder, **changed):
    """Change fields of config.json; None removes a field."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changed
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_weights(folder, change):
    """Let `change` alter the tensors of the second shard."""
    file = folder / "pytorch_model-00002-of-00002.bin"
    weights = torch.load(file)
    change(weights)
    torch.save(weights, file)


def assert_rejected(source, target, words):
    """The conversion raises a UserError that contains all `words`, and writes nothing."""
    with pytest.raises(UserError) as caught:
        convert_to_native(source, target, PromptFormat())
    assert [word for word in words if word not in str(caught.value)] == []
    assert not target.parent.exists() or list(target.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LLAMA, ["'llama', not 'chatglm'"]),
        (CHATGLM_6B, ["the first ChatGLM-6B, which has another architecture"]),
        ({"model_type": "glm"}, ["a checkpoint that is already converted"]),
        ({}, ["has model_type None"]),
        ({"model_type": "chatglm"}, ["lacks 'num_layers'"]),
    ],
    ids=["llama", "chatglm-6b", "converted", "empty", "bare"],
)
def test_a_config_of_another_model_is_rejected(config, words, source, target):
    (source / "config.json").write_text(json.dumps(config))
    assert_rejected(source, target, [*words, str(source / "config.json")])


@pytest.mark.parametrize(
    "changed",
    [{"quantization_bit": 4}, {"rmsnorm": False}, {"multi_query_attention": False}, {"tie_word_embeddings": True}],
    ids=str,
)
def test_a_config_of_a_quantized_or_different_model_is_rejected_with_the_field(changed, source, target):
    edit(source, **changed)
    (field, value) = next(iter(changed.items()))
    assert_rejected(source, target, [f"{field}={value}"])


@pytest.mark.parametrize(
    "field", ["num_layers", "kv_channels", "multi_query_group_num", "seq_length", "layernorm_epsilon"]
)
def test_a_missing_field_of_the_config_is_named(field, source, target):
    edit(source, **{field: None})
    assert_rejected(source, target, [f"lacks '{field}'"])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "pytorch_model-00001-of-00002.bin"])
def test_a_missing_file_is_named(name, source, target):
    """A missing shard is an error, not a warning about newly initialized weights."""
    (source / name).unlink()
    assert_rejected(source, target, [name])


def test_a_missing_folder_is_named(tmp_path, target):
    assert_rejected(tmp_path / "nothing", target, ["folder not found", "nothing"])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "pytorch_model-00002-of-00002.bin"])
def test_an_lfs_pointer_in_place_of_a_file_is_named(name, source, target):
    (source / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert_rejected(source, target, [name, "git lfs pull"])


def test_a_truncated_shard_is_named(source, target):
    file = source / "pytorch_model-00001-of-00002.bin"
    file.write_bytes(file.read_bytes()[:-100_000])
    assert_rejected(source, target, [file.name, "truncated"])


KEY = "transformer.output_layer.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop(KEY), ["missing", KEY]),
        (
            lambda weights: weights.update({"transformer.extra.weight": torch.zeros(2)}),
            ["unexpected", "transformer.extra.weight"],
        ),
        (
            lambda weights: weights.update({KEY: torch.zeros(2, 256)}),
            ["of the wrong shape", f"{KEY} [2, 256], not [2432, 256]"],
        ),
        (lambda weights: weights.update({KEY: torch.zeros(0)}), ["of the wrong shape", f"{KEY} [0], not [2432, 256]"]),
    ],
    ids=["missing", "unexpected", "shape", "empty"],
)
def test_a_tensor_that_is_missing_unexpected_or_of_the_wrong_shape_is_named(change, words, source, target):
    """DeepSpeed ZeRO-3 saves an empty tensor for a parameter that it did not gather."""
    edit_weights(source, change)
    assert_rejected(source, target, words)


def test_a_vocabulary_larger_than_the_embedding_is_rejected_with_both_sizes(source, target):
    """The tiny model's has 2,409 ids; an embedding of 2,400 rows would be read past its end."""

    def shorten(weights):
        for name in [name for name in weights if weights[name].shape[0] == 2432]:
            weights[name] = weights[name][:2400].clone()

    edit_weights(source, shorten)
    first = source / "pytorch_model-00001-of-00002.bin"
    weights = torch.load(first)
    shorten(weights)
    torch.save(weights, first)
    edit(source, padded_vocab_size=2400)
    assert_rejected(source, target, ["2409 ids", "2400"])


@pytest.mark.parametrize("dtype", ["keep", "float16", "float32"])
def test_a_disk_too_small_for_the_chosen_precision_is_reported_before_writing(dtype, source, target, monkeypatch):
    parameters = open_weight_files(source).nbytes // 2  # the tiny model is stored in float16
    needed = parameters * (4 if dtype == "float32" else 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, needed - 1))
    with pytest.raises(UserError, match=r"needs .*B, its disk has"):
        convert_to_native(source, target, PromptFormat(), dtype)
    assert list(target.parent.iterdir()) == []


def test_an_adapter_is_not_converted_as_a_model(source, target):
    """A P-Tuning v2 prefix is saved with the config of its base."""
    edit(source, pre_seq_len=4)
    edit_weights(
        source, lambda weights: weights.update({"transformer.prefix_encoder.embedding.weight": torch.zeros(4, 512)})
    )
    assert_rejected(source, target, ["unexpected", "prefix_encoder"])


def test_a_failed_overwrite_keeps_the_old_checkpoint(source, target):
    convert_to_native(source, target, PromptFormat())
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    with pytest.raises(UserError, match="already exists"):
        convert_to_native(source, target, PromptFormat())
    edit_weights(source, lambda weights: weights.pop(KEY))
    with pytest.raises(UserError, match="missing"):
        convert_to_native(source, target, PromptFormat(), overwrite=True)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before


def test_an_overwrite_replaces_the_old_checkpoint(source, target):
    for dtype in ("float16", "float32"):
        convert_to_native(source, target, PromptFormat(), dtype, overwrite=True)
    assert {tensor.dtype for tensor in open_native(target, verify=True).files.tensors.values()} == {torch.float32}
    assert [path.name for path in target.parent.iterdir()] == ["native"]


def test_converting_back_needs_the_original_vocabulary(toy_native, tmp_path):
    folder = shutil.copytree(toy_native, tmp_path / "native")
    for name in ("tokenizer.model", "manifest.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"contains no tokenizer\.model"):
        convert_to_original(folder, tmp_path / "back")


HELD = """
import sys, time
from entrypoints.__main__ import main
from entrypoints.checkpoint import conversion

def hold(*_):
    print("weights written", flush=True)
    time.sleep(300)

conversion.write_manifest = hold
sys.exit(main(["convert", *sys.argv[1:]]))
"""


@pytest.fixture
def held(source, target):
    """A conversion in another process, stopped after its weights are written."""
    command = [sys.executable, "-c", HELD, str(source), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "weights written\n"
        yield process
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "leftovers"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, 2)])
def test_a_running_conversion_excludes_others_and_when_interrupted_leaves_no_target(
    number, leftovers, held, source, target
):
    """SIGKILL leaves the hidden folder and the lock file; the next run removes both."""
    with pytest.raises(UserError, match="another process is writing"):
        convert_to_native(source, target, PromptFormat(), overwrite=True)
    convert_to_native(source, target.with_name("other"), PromptFormat())
    shutil.rmtree(target.with_name("other"))
    held.send_signal(number)
    assert held.wait(120) in {signal.SIGTERM: [143], signal.SIGINT: [130], signal.SIGKILL: [-9]}[number]
    assert not target.exists()
    assert len(list(target.parent.iterdir())) == leftovers
    convert_to_native(source, target, PromptFormat())
    assert open_native(target, verify=True).model_config.num_layers == 4
    assert [path.name for path in target.parent.iterdir()] == ["native"]
