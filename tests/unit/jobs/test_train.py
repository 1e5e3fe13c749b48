"""What `glm train` refuses, and when: before the model is loaded. What it makes: test_train_runs.py."""

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from entrypoints.jobs import train
from entrypoints.training.arguments import TrainArguments

FREEZE = ("--method", "freeze", "--freeze-layers", 9)  # the toy has four
ROW = {"content": "类型#裙", "summary": "好看的裙子。"}


class Loading(Exception):
    """The model would be loaded now."""


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    def from_pretrained(*_, **__):
        raise Loading

    for loader in (AutoModelForCausalLM, PreTrainedModel):
        monkeypatch.setattr(loader, "from_pretrained", from_pretrained)


@pytest.fixture
def run(glm, toy_native, rows_file, tmp_path):
    """Run `glm train` on one good row; flags given again win."""

    def start(*words):
        file = rows_file(ROW, name="good.jsonl")
        common = ("--model-name-or-path", toy_native, "--train-file", file, "--output-dir", tmp_path / "out")
        return glm("train", *common, *words)

    return start


def test_flags_have_the_defaults_of_train_arguments():
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    flags = {action.dest: action for action in parser._actions}
    known = {field.name: field for field in fields(TrainArguments)}
    shared = set(flags) & set(known) - {"model_name_or_path", "train_file", "output_dir", "device"}
    assert len(shared) >= 22
    assert {name: flags[name].default for name in shared} == {name: known[name].default for name in shared}
    assert set(known) - set(flags) == {"columns", "prompt_format"}


def test_the_tutorials_flags_are_understood_with_their_underscores(glm, toy_native, rows_file, tmp_path):
    """ds_train_finetune.sh of ChatGLM2's ptuning folder, without torchrun, --deepspeed and --fp16."""
    file = rows_file(ROW)
    script = f"""--do_train --train_file {file} --test_file {file} --prompt_column content --response_column summary
        --overwrite_cache --model_name_or_path {toy_native} --output_dir {tmp_path}/adgen-ft --overwrite_output_dir
        --max_source_length 64 --max_target_length 64 --per_device_train_batch_size 4 --per_device_eval_batch_size 1
        --gradient_accumulation_steps 1 --predict_with_generate --max_steps 5000 --logging_steps 10 --save_steps 1000
        --learning_rate 1e-4 --preprocessing_num_workers 1"""
    with pytest.raises(Loading):
        glm("train", *script.split())


def test_a_wrong_column_is_told_with_the_columns_there_are(run):
    """F4."""
    told = run("--prompt_column", "prompt", "--response_column", "response").mistake()
    assert "no column 'prompt' and no column 'response' in good.jsonl; columns: content, summary" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--prompt-column", "ask"), "no column 'ask'"),
        (("--train-file", "/no/such/file"), "there is no file"),
        (("--model-name-or-path", "/no/such/folder"), "is no folder"),
        (("--deepspeed", "zero4"), "is no file and no preset"),
        (("--learning-rate", "0"), "is not above 0"),
    ],
)
def test_a_mistake_is_told_before_torch_is_imported(words, told, toy_native, rows_file, tmp_path):
    """That alone takes seconds."""
    code = "import sys; from entrypoints.__main__ import main; code = main(sys.argv[1:]); print('torch' in sys.modules)"
    common = ["--model-name-or-path", toy_native, "--train-file", rows_file(ROW), "--output-dir", tmp_path / "out"]
    command = [sys.executable, "-c", code, "train", *map(str, common), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert told in done.stderr
    assert done.stdout == "False\n"


def test_rows_that_cannot_be_used_are_counted_and_told_with_their_reasons(run, rows_file, capsys):
    """F5."""
    rows = [("a", ""), (None, "b"), ("c", "d"), (1, 2)]
    file = rows_file(*({"content": prompt, "summary": response} for prompt, response in rows), name="mixed.jsonl")
    with pytest.raises(Loading):
        run("--train-file", file)
    err = capsys.readouterr().err
    assert "1 rows used, 3 skipped" in err
    for reason in ("mixed.jsonl:1: empty response", "mixed.jsonl:2: null prompt", "mixed.jsonl:4: prompt is not a"):
        assert reason in err


def test_a_file_of_unusable_rows_alone_is_a_mistake(run, rows_file):
    """F5."""
    told = run("--train-file", rows_file({"content": "a", "summary": ""}, {"content": None, "summary": "b"})).mistake()
    assert "no usable row" in told
    assert "1 empty response, 1 null prompt" in told


@pytest.mark.parametrize("flag", ["--train-file", "--validation-file", "--test-file"])
def test_a_file_that_is_not_there_is_named(flag, run, tmp_path):
    """F6, missing."""
    assert f"there is no file {tmp_path / 'nowhere.json'}" in run(flag, tmp_path / "nowhere.json").mistake()


def test_limits_that_do_not_hold_the_frame_are_told_with_the_least_that_does(run):
    """The frame: [gMASK] sop, user tag, its newline, the empty body, assistant tag; the answer's: its newline."""
    told = run("--max-source-length", 3).mistake()
    least = int(re.fullmatch(r"glm: max_source_length 3 does not hold the prompt's frame; use at least (\d+)", told)[1])
    assert str(least) in run("--max-source-length", least - 1).mistake()
    with pytest.raises(Loading):
        run("--max-source-length", least)
    told = run("--max-target-length", 1).mistake()
    least = int(
        re.fullmatch(r"glm: max_target_length 1 does not hold the answer's header; use at least (\d+)", told)[1]
    )
    with pytest.raises(Loading):
        run("--max-target-length", least)


def test_rows_longer_than_the_window_are_a_mistake(run, rows_file):
    file = rows_file({"content": "裙" * 3000, "summary": "好"})
    told = run("--train-file", file, "--max-source-length", 4000).mistake()
    assert "the model's window is 1024" in told


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_cannot_be_tuned_in_full(bits, run):
    """G4."""
    assert "cannot be tuned in full" in run("--quantization_bit", bits).mistake()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here, so --fp16 is fine")
def test_fp16_without_cuda_is_refused(run):
    """G3: on CUDA the weights stay in float32 and only the forward pass is float16."""
    assert "--fp16 needs a CUDA device" in run("--fp16").mistake()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
@pytest.mark.parametrize("by", ["flag", "variable"])
def test_a_device_that_is_not_there_is_refused(by, run, monkeypatch):
    if by == "variable":
        monkeypatch.setenv("DEVICE", "cuda")
    assert "no CUDA device" in run(*(["--device", "cuda"] if by == "flag" else [])).mistake()


def test_all_numbers_out_of_bounds_are_told_at_once(run):
    told = run(
        "--learning-rate", 0, "--num-train-epochs", -1, "--max-steps", 0, "--save-total-limit", 0, "--fp16", "--bf16"
    ).mistake()
    for part in ("--learning-rate 0.0", "--num-train-epochs -1.0", "--max-steps 0", "--save-total-limit 0", "exclude"):
        assert part in told


def test_scores_need_rows_to_answer(run):
    assert "--test-file" in run("--predict-with-generate").mistake()


def test_no_model_is_a_mistake_and_the_variable_names_one(glm, toy_native, rows_file, tmp_path, monkeypatch):
    words = ("train", "--train-file", rows_file(ROW), "--output-dir", tmp_path / "out")
    assert "--model-name-or-path" in glm(*words).mistake()
    monkeypatch.setenv("MODEL_PATH", str(toy_native))
    with pytest.raises(Loading):
        glm(*words)


def test_the_original_layout_must_be_converted_first(run, toy_original):
    assert "convert it first: glm convert" in run("--model-name-or-path", toy_original).mistake()


class TestOutput:
    """The folder for the result."""

    def test_it_must_be_empty_or_be_given_up(self, run, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("dear")
        assert "--overwrite-output-dir" in run().mistake()
        with pytest.raises(Loading):
            run("--overwrite-output-dir")
        assert (tmp_path / "out" / "notes.txt").read_text() == "dear"

    def test_it_cannot_be_a_file_nor_below_one(self, run, tmp_path):
        (tmp_path / "taken").write_text("")
        assert "is a file" in run("--output-dir", tmp_path / "taken").mistake()
        assert "cannot make --output-dir" in run("--output-dir", tmp_path / "taken" / "out").mistake()

    def test_it_cannot_be_or_hold_the_base_model(self, run, toy_native, tmp_path):
        """To go on from out/checkpoint-500 into out would delete it before it is read."""
        old = shutil.copytree(toy_native, tmp_path / "out" / "checkpoint-500")
        for base, output in ((toy_native, toy_native), (old, tmp_path / "out")):
            told = run("--model-name-or-path", base, "--output-dir", output, "--overwrite-output-dir").mistake()
            assert "the base model's own folder" in told
        assert (old / "model.safetensors").is_file()

    def test_an_earlier_result_outlives_a_mistake(self, run, tmp_path):
        old = [tmp_path / "out" / "checkpoint-3" / "config.json", tmp_path / "out" / "model.safetensors"]
        exported = tmp_path / "out" / "checkpoint-3-export" / "config.json"  # not this run's to remove
        for file in (*old, exported):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("dear")
        for words in (("--max-source-length", 3), ("--train-file", "/no/such/file"), ("--quantization-bit", 4), FREEZE):
            run("--overwrite-output-dir", *words).mistake()
        assert all(file.read_text() == "dear" for file in old)
        with pytest.raises(Loading):
            run("--overwrite-output-dir")
        assert not any(file.exists() for file in old) and exported.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--lora-rank", 16), "--lora-rank belongs to --method lora or qlora, and the method is full"),
        (("--freeze-layers", 2, "--method", "lora"), "--freeze-layers belongs to --method freeze"),
        (("--prefix-projection",), "--prefix-projection belongs to --method ptuning"),
        (("--method", "lora", "--pre-seq-len", 8), "--pre-seq-len belongs to --method ptuning"),
    ],
)
def test_a_flag_of_another_method_is_refused_instead_of_left_unused(words, told, run):
    assert told in run(*words).mistake()


def test_test_rows_that_cannot_be_answered_are_counted(run, rows_file, capsys):
    file = rows_file(ROW, {"content": "类型#裤", "summary": ""}, name="test.jsonl")
    with pytest.raises(Loading):
        run("--test-file", file)
    assert "test.jsonl: 1 rows to answer, 1 skipped, the first in line 2: empty response" in capsys.readouterr().err
