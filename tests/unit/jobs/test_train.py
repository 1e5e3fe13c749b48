"""Errors of `glm train` before the model is loaded. Results of runs: test_train_runs.py."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import fields

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from entrypoints.jobs import train
from entrypoints.training import run_context
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.preflight import memory_check, quick_checks

FREEZE = ("--method", "freeze", "--freeze-layers", 9)  # the tiny model has four layers
ROW = {"content": "类型#裙", "summary": "好看的裙子。"}


class Loading(Exception):
    """Raised where the model would be loaded."""


@pytest.fixture(autouse=True)
def no_loading(monkeypatch):
    def from_pretrained(*_, **__):
        raise Loading

    for loader in (AutoModelForCausalLM, PreTrainedModel):
        monkeypatch.setattr(loader, "from_pretrained", from_pretrained)


@pytest.fixture
def run(glm, toy_native, rows_file, tmp_path):
    """Run `glm train` on one usable row; repeated flags override the first ones."""

    def start(*flags):
        file = rows_file(ROW, name="good.jsonl")
        common = ("--model-name-or-path", toy_native, "--train-file", file, "--output-dir", tmp_path / "out")
        return glm("train", *common, *flags)

    return start


def test_flags_have_the_defaults_of_train_arguments():
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    flags = {action.dest: action for action in parser._actions}
    known = {field.name: field for field in fields(TrainArguments)}
    shared = set(flags) & set(known) - {"model_name_or_path", "train_file", "output_dir", "device"}
    assert len(shared) >= 22
    assert {name: flags[name].default for name in shared} == {name: known[name].default for name in shared}
    assert set(known) - set(flags) == {"columns"}


def test_the_flags_of_the_public_script_are_accepted_with_underscores(glm, toy_native, rows_file, tmp_path):
    """ds_train_finetune.sh in the ptuning folder of ChatGLM2, without torchrun, --deepspeed and --fp16."""
    file = rows_file(ROW)
    script = f"""--do_train --train_file {file} --test_file {file} --prompt_column content --response_column summary
        --overwrite_cache --model_name_or_path {toy_native} --output_dir {tmp_path}/adgen-ft --overwrite_output_dir
        --max_source_length 64 --max_target_length 64 --per_device_train_batch_size 4 --per_device_eval_batch_size 1
        --gradient_accumulation_steps 1 --predict_with_generate --max_steps 5000 --logging_steps 10 --save_steps 1000
        --learning_rate 1e-4 --preprocessing_num_workers 1"""
    with pytest.raises(Loading):
        glm("train", *script.split())


def test_the_error_for_a_wrong_column_lists_the_existing_columns(run):
    message = run("--prompt_column", "prompt", "--response_column", "response").mistake()
    assert "no column 'prompt' and no column 'response' in good.jsonl; columns: content, summary" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompt-column", "ask"), "no column 'ask'"),
        (("--train-file", "/no/such/file"), "file not found"),
        (("--test-file", "/no/such/file"), "file not found"),
        (("--model-name-or-path", "/no/such/folder"), "folder not found"),
        (("--deepspeed", "zero4"), "is neither a file nor a preset"),
        (("--learning-rate", "0"), "is not above 0"),
    ],
)
def test_a_user_error_is_reported_before_torch_is_imported(flags, message, toy_native, rows_file, tmp_path):
    """The import takes seconds."""
    code = "import sys; from entrypoints.__main__ import main; code = main(sys.argv[1:]); print('torch' in sys.modules)"
    common = ["--model-name-or-path", toy_native, "--train-file", rows_file(ROW), "--output-dir", tmp_path / "out"]
    command = [sys.executable, "-c", code, "train", *map(str, common), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert message in done.stderr
    assert done.stdout == "False\n"


CHECKS = [
    (quick_checks, "check_rows"),
    (quick_checks, "check_output_dir"),
    (run_context, "resolve_precision"),
    (run_context, "open_native"),
    (memory_check, "check_shared_memory"),
    (memory_check, "check_states_fit"),
]


def test_a_process_checks_each_fact_once(run, monkeypatch):
    calls = Counter()

    def counted(name, function):
        def call(*args):
            calls[name] += 1
            return function(*args)

        return call

    for module, name in CHECKS:
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    with pytest.raises(Loading):
        run()
    assert calls == {name: 1 for _, name in CHECKS}


def test_rows_that_cannot_be_used_are_counted_and_logged_with_their_reasons(run, rows_file, capsys):
    rows = [("a", ""), (None, "b"), ("c", "d"), (1, 2)]
    file = rows_file(*({"content": prompt, "summary": response} for prompt, response in rows), name="mixed.jsonl")
    with pytest.raises(Loading):
        run("--train-file", file, "--max-skipped", 3)
    err = capsys.readouterr().err
    assert "1 rows used, 3 skipped" in err
    for reason in ("1: empty response", "2: null prompt", "4: column 'content' is a number, not a string"):
        assert f"mixed.jsonl:{reason}" in err


@pytest.mark.parametrize("flag", ["--train-file", "--validation-file", "--test-file"])
def test_a_response_of_another_type_ends_the_run_before_a_missing_model_is_noticed(flag, run, rows_file):
    """The message has file, line, column and both types; 2,000 rows before it do not hide it."""
    file = rows_file(*[ROW] * 2000, {**ROW, "summary": {"text": "b"}}, {**ROW, "summary": None}, name="mixed.jsonl")
    message = run(flag, file, "--model-name-or-path", "/no/such/folder").mistake()
    assert f"{file}:2001: column 'summary' is an object, not a string; 2 rows cannot be used" in message
    assert message.endswith("fix them, or allow them with --max-skipped 2")
    allowed = run(flag, file, "--model-name-or-path", "/no/such/folder", "--max-skipped", 2).mistake()
    assert "folder not found: /no/such/folder" in allowed


def test_train_says_how_rows_were_read_and_names_what_is_not_used(run, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    turns = [{"from": "human", "value": "北京"}, {"from": "gpt", "value": "好", "score": 5}]
    for number in range(2):
        row = json.dumps({"conversations": turns, "id": number})
        (folder / f"part-{number}.jsonl").write_text(f"{row}\n", encoding="utf-8")
    with pytest.raises(Loading):
        run("--train-file", folder)
    err = capsys.readouterr().err
    assert f"{folder}: read as ShareGPT: 2 rows" in err
    assert f"{folder}: not used: id in 2 rows, conversations.score in 2 rows" in err


def test_a_format_that_the_rows_do_not_have_is_rejected(run):
    assert "no column 'instruction' and no column 'output' in good.jsonl" in run("--format", "alpaca").mistake()


def test_a_file_without_a_usable_row_is_rejected(run, rows_file):
    message = run(
        "--train-file", rows_file({"content": "a", "summary": ""}, {"content": None, "summary": "b"})
    ).mistake()
    assert "no usable row" in message
    assert "1 empty response, 1 null prompt" in message


@pytest.mark.parametrize("flag", ["--train-file", "--validation-file", "--test-file"])
def test_the_error_for_a_missing_file_names_it(flag, run, tmp_path):
    assert f"file not found: {tmp_path / 'nowhere.json'}" in run(flag, tmp_path / "nowhere.json").mistake()


def test_the_error_for_a_too_small_limit_names_the_smallest_possible_one(run):
    """A prompt needs [gMASK] sop, user tag, newline, assistant tag; an answer needs its newline."""
    message = run("--max-source-length", 3).mistake()
    least = int(re.fullmatch(r"glm: --max-source-length 3 does not hold .* role tags; use at least (\d+)", message)[1])
    assert str(least) in run("--max-source-length", least - 1).mistake()
    with pytest.raises(Loading):
        run("--max-source-length", least)
    message = run("--max-target-length", 1).mistake()
    least = int(
        re.fullmatch(r"glm: --max-target-length 1 does not hold the answer's header; use at least (\d+)", message)[1]
    )
    with pytest.raises(Loading):
        run("--max-target-length", least)


LONG_SYSTEM = {
    "messages": [
        {"role": "system", "content": "规" * 300},
        {"role": "user", "content": "裙"},
        {"role": "assistant", "content": "好看。"},
    ]
}
ANSWERED = {"messages": LONG_SYSTEM["messages"][1:]}


def test_a_training_row_with_a_long_system_text_is_refused_with_the_length_that_holds_it(run, rows_file):
    file = rows_file(ANSWERED, LONG_SYSTEM, name="talk.jsonl")
    message = run("--train-file", file, "--max-source-length", 64).mistake()
    found = re.search(r"set --max-source-length (\d+), or allow them with --max-skipped 1$", message)
    assert f"{file}:2: --max-source-length 64 does not hold the prompt's system text, tools" in message
    with pytest.raises(Loading):
        run("--train-file", file, "--max-source-length", found[1])


@pytest.mark.parametrize(
    "flags", [("--predict-with-generate",), ("--do-predict",), ("--do-predict", "--source-prefix", "请回答：" * 9)]
)
def test_a_test_row_without_a_prompt_is_found_before_the_model_is_loaded(flags, run, rows_file, capsys):
    file = rows_file(ANSWERED, LONG_SYSTEM, name="talk.jsonl")
    flags = ("--do-train", "--test-file", file, "--max-source-length", 128, *flags)
    message = run(*flags).mistake()
    found = re.search(r"1 row cannot be used; set --max-source-length (\d+), or allow them with --max-skip", message)
    assert f"{file}:2: --max-source-length 128 does not hold" in message
    for more in (("--max-source-length", found[1]), ("--max-skipped", 1)):
        with pytest.raises(Loading):
            run(*flags, "--overwrite-output-dir", *more)
    err = capsys.readouterr().err
    assert "talk.jsonl: 1 rows to answer, 1 skipped, the first in line 2: --max-source-length 128 does not hold" in err


@pytest.mark.parametrize("part", ["--do-predict", "--do-eval"])
def test_an_evaluation_alone_finds_a_row_without_a_prompt_before_it_loads_the_model(part, run, rows_file):
    file = rows_file(ANSWERED, LONG_SYSTEM, name="talk.jsonl")
    flags = (part, "--test-file", file, "--validation-file", file, "--max-source-length", 64)
    assert f"{file}:2: --max-source-length 64 does not hold" in run(*flags).mistake()
    with pytest.raises(Loading):
        run(*flags, "--max-skipped", 1)


@pytest.mark.parametrize("parts", [("--do-train", "--do-predict"), ("--do-predict",)])
def test_a_prompt_that_fills_the_context_is_found_before_the_model_is_loaded(parts, run, rows_file):
    file = rows_file(ROW, {"content": "裙" * 3000, "summary": "好"}, name="test.jsonl")
    message = run(*parts, "--test-file", file, "--max-source-length", 4000).mistake()
    assert f"{file}:2: the longest prompt has " in message
    assert message.endswith("the context length is 1024; lower --max-source-length to at most 1023")
    with pytest.raises(Loading):
        run(*parts, "--test-file", file, "--max-source-length", 1023)


def test_rows_longer_than_the_context_length_are_rejected(run, rows_file):
    file = rows_file({"content": "裙" * 3000, "summary": "好"})
    message = run("--train-file", file, "--max-source-length", 4000).mistake()
    assert "the context length of the model is 1024" in message


@pytest.mark.parametrize("bits", [4, 8])
def test_full_fine_tuning_of_quantized_weights_is_rejected(bits, run):
    assert "weights cannot be trained" in run("--quantization_bit", bits).mistake()


@pytest.mark.skipif(torch.cuda.is_available(), reason="--fp16 works on a CUDA device")
def test_fp16_without_cuda_is_rejected(run):
    """On CUDA the weights stay in float32 and only the forward pass is in float16."""
    assert "--fp16 needs a CUDA device" in run("--fp16").mistake()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
@pytest.mark.parametrize("by", ["flag", "variable"])
def test_a_missing_cuda_device_is_rejected(by, run, monkeypatch):
    if by == "variable":
        monkeypatch.setenv("DEVICE", "cuda")
    assert "no CUDA device" in run(*(["--device", "cuda"] if by == "flag" else [])).mistake()


def test_all_values_out_of_range_are_reported_at_once(run):
    message = run(
        "--learning-rate", 0, "--num-train-epochs", -1, "--max-steps", 0, "--save-total-limit", 0, "--fp16", "--bf16"
    ).mistake()
    for part in ("--learning-rate 0.0", "--num-train-epochs -1.0", "--max-steps 0", "--save-total-limit 0", "exclude"):
        assert part in message


def test_predict_with_generate_needs_a_test_file(run):
    assert "--test-file" in run("--predict-with-generate").mistake()


def test_a_run_without_a_model_is_rejected_and_model_path_names_one(glm, toy_native, rows_file, tmp_path, monkeypatch):
    flags = ("train", "--train-file", rows_file(ROW), "--output-dir", tmp_path / "out")
    assert "--model-name-or-path" in glm(*flags).mistake()
    monkeypatch.setenv("MODEL_PATH", str(toy_native))
    with pytest.raises(Loading):
        glm(*flags)


def test_a_base_model_in_the_original_layout_must_be_converted_first(run, toy_original):
    assert "convert it first: glm convert" in run("--model-name-or-path", toy_original).mistake()


class TestOutput:
    """The folder for the result."""

    def test_it_must_be_empty_or_be_overwritten(self, run, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("dear")
        assert "--overwrite-output-dir" in run().mistake()
        with pytest.raises(Loading):
            run("--overwrite-output-dir")
        assert (tmp_path / "out" / "notes.txt").read_text() == "dear"

    def test_it_cannot_be_a_file_nor_below_one(self, run, tmp_path):
        (tmp_path / "taken").write_text("")
        assert "is a file" in run("--output-dir", tmp_path / "taken").mistake()
        assert "cannot create --output-dir" in run("--output-dir", tmp_path / "taken" / "out").mistake()

    def test_it_cannot_be_or_hold_the_base_model(self, run, toy_native, tmp_path):
        """Training from out/checkpoint-500 into out would delete it before it is read."""
        old = shutil.copytree(toy_native, tmp_path / "out" / "checkpoint-500")
        for base, output in ((toy_native, toy_native), (old, tmp_path / "out")):
            message = run("--model-name-or-path", base, "--output-dir", output, "--overwrite-output-dir").mistake()
            assert "the folder of the base model" in message
        assert (old / "model.safetensors").is_file()

    def test_an_earlier_result_survives_a_user_error(self, run, tmp_path):
        old = [tmp_path / "out" / "checkpoint-3" / "config.json", tmp_path / "out" / "model.safetensors"]
        exported = tmp_path / "out" / "checkpoint-3-export" / "config.json"  # does not belong to the run
        for file in (*old, exported):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("dear")
        for flags in (("--max-source-length", 3), ("--train-file", "/no/such/file"), ("--quantization-bit", 4), FREEZE):
            run("--overwrite-output-dir", *flags).mistake()
        assert all(file.read_text() == "dear" for file in old)
        with pytest.raises(Loading):
            run("--overwrite-output-dir")
        assert not any(file.exists() for file in old)
        assert exported.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lora-rank", 16), "--lora-rank belongs to --method lora or qlora, but the method is full"),
        (("--freeze-layers", 2, "--method", "lora"), "--freeze-layers belongs to --method freeze"),
        (("--prefix-projection",), "--prefix-projection belongs to --method ptuning"),
        (("--method", "lora", "--pre-seq-len", 8), "--pre-seq-len belongs to --method ptuning"),
    ],
)
def test_a_flag_that_the_method_does_not_use_is_rejected(flags, message, run):
    assert message in run(*flags).mistake()


def test_unusable_test_rows_are_counted_and_logged(run, rows_file, capsys):
    file = rows_file(ROW, {"content": "类型#裤", "summary": ""}, name="test.jsonl")
    with pytest.raises(Loading):
        run("--test-file", file, "--max-skipped", 1)
    assert "test.jsonl: 1 rows to answer, 1 skipped, the first in line 2: empty response" in capsys.readouterr().err
