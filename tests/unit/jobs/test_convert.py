"""`glm convert`: both directions, its flags, adapters, and inputs that it rejects."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.checkpoint.native import open_native
from entrypoints.checkpoint.tensor_files import open_weight_files


@pytest.fixture
def original(toy_original, tmp_path):
    return shutil.copytree(toy_original, tmp_path / "original")


def test_stdout_is_the_new_folder_which_can_be_opened(toy_original, tmp_path, glm):
    done = glm("convert", toy_original, tmp_path / "native")
    assert (done.code, done.out) == (0, f"{tmp_path / 'native'}\n")
    assert open_native(tmp_path / "native", verify=True).prompt_format == PromptFormat()
    assert {path.name for path in tmp_path.iterdir()} == {"native"}


def test_converting_to_the_original_layout_restores_the_tensors(toy_original, toy_native, tmp_path, glm):
    assert glm("convert", toy_native, tmp_path / "original", "--to", "original").code == 0
    first, second = open_weight_files(toy_original), open_weight_files(tmp_path / "original")
    assert set(first.tensors) == set(second.tensors)
    files = {tensor.file for tensor in first.tensors.values()}
    before = {name: tensor for file in files for name, tensor in first.load_file(file).items()}
    after = load_file(tmp_path / "original" / "model.safetensors")
    assert all(before[name].equal(after[name]) for name in before)


def test_the_template_a_checkpoint_was_tuned_with_is_stored(toy_original, tmp_path, glm):
    glm("convert", toy_original, tmp_path / "native", "--template", "round")
    assert json.loads((tmp_path / "native" / "prompt.json").read_text())["template"] == "round"


def test_the_precision_can_be_chosen(toy_original, tmp_path, glm):
    glm("convert", toy_original, tmp_path / "native", "--dtype", "bfloat16")
    stored = open_native(tmp_path / "native").files.tensors.values()
    assert {str(tensor.dtype) for tensor in stored} == {"torch.bfloat16"}
    assert json.loads((tmp_path / "native" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_existing_folder_is_replaced_only_with_overwrite(toy_original, tmp_path, glm):
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "mine.txt").write_text("keep")
    assert "--overwrite" in glm("convert", toy_original, tmp_path / "native").mistake()
    assert (tmp_path / "native" / "mine.txt").read_text() == "keep"
    assert glm("convert", toy_original, tmp_path / "native", "--overwrite").code == 0
    assert open_native(tmp_path / "native")
    assert not (tmp_path / "native" / "mine.txt").exists()


def test_a_folder_is_never_converted_into_itself(original, glm):
    before = sorted(path.name for path in original.iterdir())
    assert "both SRC and DST" in glm("convert", original, original.parent / "x" / ".." / "original").mistake()
    assert sorted(path.name for path in original.iterdir()) == before


def damage(original, problem):
    """Damage a copy of the tiny model; returns the folder to pass as SRC."""
    if problem == "missing folder":
        return original / "nowhere"
    if problem == "missing config":
        (original / "config.json").unlink()
    elif problem == "already converted":
        (original / "config.json").write_text('{"model_type": "glm"}')
    elif problem == "missing vocabulary":
        (original / "tokenizer.model").unlink()
    elif problem == "missing shard":
        (original / "pytorch_model-00002-of-00002.bin").unlink()
    elif problem == "LFS pointer":
        (original / "pytorch_model-00001-of-00002.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    elif problem == "wrong size":
        config = json.loads((original / "config.json").read_text())
        (original / "config.json").write_text(json.dumps(config | {"ffn_hidden_size": 999}))
    return original


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("missing folder", "folder not found"),
        ("missing config", "config.json"),
        ("already converted", "a checkpoint that is already converted"),
        ("missing vocabulary", "tokenizer.model"),
        ("missing shard", "pytorch_model-00002-of-00002.bin"),
        ("LFS pointer", "Git LFS pointer"),
        ("wrong size", "mlp.dense_h_to_4h.weight [1024, 256], not [1998, 256]"),
    ],
)
def test_an_unusable_source_is_named_and_nothing_is_written(problem, message, original, tmp_path, glm):
    assert message in glm("convert", damage(original, problem), tmp_path / "native").mistake()
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


@pytest.mark.slow
def test_a_lora_needs_its_base_and_changes_the_answers(golden, golden_native, tmp_path, glm):
    source = golden / "original-tiny-lora"
    assert "--base" in glm("convert", source, tmp_path / "lora").mistake()
    assert glm("convert", source, tmp_path / "lora", "--base", golden_native).code == 0
    flags = ("--prompt", "你好", "--temperature", 0, "--max-new-tokens", 8, "--dtype", "float32", "--json")
    plain = json.loads(glm("chat", "--model", golden_native, *flags).out)
    adapted = json.loads(glm("chat", "--model", golden_native, "--adapter", tmp_path / "lora", *flags).out)
    assert plain["response"] != adapted["response"]


def test_a_prefix_needs_no_base_and_keeps_its_template(golden, tmp_path, glm):
    assert glm("convert", golden / "original-tiny-ptuning", tmp_path / "prefix", "--template", "round").code == 0
    assert json.loads((tmp_path / "prefix" / "adapter_config.json").read_text())["pre_seq_len"] == 8
    assert json.loads((tmp_path / "prefix" / "prompt.json").read_text())["template"] == "round"
