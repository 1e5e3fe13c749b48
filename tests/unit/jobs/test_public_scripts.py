"""The flags of the scripts in the folder ptuning of ChatGLM2-6B's repository, unchanged, on the tiny model.

What follows "beside the script" keeps the run short and on the CPU.
"""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file

ROWS = [{"content": f"类型#裙*颜色#{color}", "summary": f"{color}色的裙子。"} for color in "红蓝白黑绿黄"]
ON_CPU = ("--device", "cpu", "--max_steps", 2, "--save_steps", 1, "--gradient_accumulation_steps", 1)
ON_CPU = (*ON_CPU, "--preprocessing_num_workers", 1)  # beside the script
TRAIN = """--do_train --train_file {data}/train.json --validation_file {data}/dev.json --preprocessing_num_workers 10
    --prompt_column content --response_column summary --overwrite_cache --model_name_or_path {model}
    --output_dir {out}/adgen-chatglm2-6b-pt-128-2e-2 --overwrite_output_dir --max_source_length 64
    --max_target_length 128 --per_device_train_batch_size 1 --per_device_eval_batch_size 1
    --gradient_accumulation_steps 16 --predict_with_generate --max_steps 3000 --logging_steps 10 --save_steps 1000
    --learning_rate 2e-2 --pre_seq_len 128 --quantization_bit 4"""
EVALUATE = """--do_predict --validation_file {data}/dev.json --test_file {data}/dev.json --overwrite_cache
    --prompt_column content --response_column summary --model_name_or_path {model}
    --ptuning_checkpoint {out}/adgen-chatglm2-6b-pt-128-2e-2/checkpoint-2
    --output_dir {out}/adgen-chatglm2-6b-pt-128-2e-2 --overwrite_output_dir --max_source_length 64
    --max_target_length 64 --per_device_eval_batch_size 1 --predict_with_generate --pre_seq_len 128
    --quantization_bit 4"""
FINETUNE = """--do_train --train_file {data}/train.json --test_file {data}/dev.json --prompt_column content
    --response_column summary --overwrite_cache --model_name_or_path {model}
    --output_dir {out}/adgen-chatglm2-6b-ft-1e-4 --overwrite_output_dir --max_source_length 64 --max_target_length 64
    --per_device_train_batch_size 4
    --per_device_eval_batch_size 1 --gradient_accumulation_steps 1 --predict_with_generate --max_steps 5000
    --logging_steps 10 --save_steps 1000 --learning_rate 1e-4 --fp16"""
EVALUATE_FINETUNE = """--do_predict --validation_file {data}/dev.json --test_file {data}/dev.json --overwrite_cache
    --prompt_column content --response_column summary
    --model_name_or_path {out}/adgen-chatglm2-6b-ft-1e-4/checkpoint-2 --output_dir {out}/adgen-chatglm2-6b-ft-1e-4
    --overwrite_output_dir --max_source_length 256 --max_target_length 256 --per_device_eval_batch_size 1
    --predict_with_generate --fp16_full_eval"""


@pytest.fixture
def script(glm, toy_native, tmp_path):
    """Run the flags of a script with these files and folders in place of its own."""
    data = tmp_path / "AdvertiseGen"
    data.mkdir()
    for name, rows in (("train.json", ROWS), ("dev.json", ROWS[:3])):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (data / name).write_text("".join(lines), encoding="utf-8")

    def run(flags, *beside):
        return glm("train", *flags.format(data=data, model=toy_native, out=tmp_path / "output").split(), *beside)

    return run


@pytest.mark.slow
def test_train_and_evaluate_with_p_tuning(script, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    output = tmp_path / "output" / "adgen-chatglm2-6b-pt-128-2e-2"
    done = script(TRAIN, *ON_CPU)
    assert (done.code, done.out) == (0, f"{output}\n")
    assert "--predict-with-generate has no effect without --test-file" in done.err
    assert load_file(output / "prefix.safetensors")["prefix"].shape[2] == 128
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    done = script(EVALUATE, "--device", "cpu", "--max_target_length", 8)
    assert (done.code, done.out) == (0, f"{output}\n")
    answers = (output / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["reference"] for line in answers] == [row["summary"] for row in ROWS[:3]]
    assert json.loads((output / "predict_results.json").read_text())["n"] == 3
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")} == before


@pytest.mark.slow
def test_finetune_and_evaluate(script, tmp_path):
    output = tmp_path / "output" / "adgen-chatglm2-6b-ft-1e-4"
    done = script(FINETUNE.replace("--fp16", ""), *ON_CPU, "--max_target_length", 8)
    assert done.code == 0, done.err
    names = ("generated_predictions.jsonl", "predict_results.json")
    trained = [(output / name).read_bytes() for name in names]
    done = script(EVALUATE_FINETUNE.replace("--fp16_full_eval", ""), "--device", "cpu", "--max_target_length", 8)
    assert (done.code, done.out) == (0, f"{output}\n"), done.err
    assert [(output / "earlier-1" / name).read_bytes() for name in names] == trained
    assert json.loads((output / "predict_results.json").read_text())["n"] == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
@pytest.mark.parametrize(("flags", "named"), [(EVALUATE, "contains no adapter"), (FINETUNE, "--fp16")])
def test_what_needs_cuda_is_named_without_it(flags, named, script):
    assert named in script(flags).mistake()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_scripts_run_unchanged_on_cuda(script):
    for flags in (TRAIN, EVALUATE, FINETUNE, EVALUATE_FINETUNE):
        assert script(flags, *(() if "do_predict" in flags else ON_CPU[2:])).code == 0


class TestParts:
    """--do_train, --do_eval and --do_predict."""

    def test_an_evaluation_alone_has_the_loss_of_the_training_run(self, script, tmp_path):
        """The mean over the labels of the validation rows, by another path than the Trainer's."""
        exact, in_4_bits = "", "--quantization_bit 4"
        assert (
            script(TRAIN.replace(in_4_bits, exact), *ON_CPU, "--do_eval", "--per_device_eval_batch_size", 3).code == 0
        )
        output = tmp_path / "output" / "adgen-chatglm2-6b-pt-128-2e-2"
        trained = json.loads((output / "eval_results.json").read_text())["eval_loss"]
        alone = EVALUATE.replace(in_4_bits, exact).replace("--do_predict", "--do_eval")
        assert (
            script(alone, "--device", "cpu", "--max_target_length", 128, "--output_dir", tmp_path / "alone").code == 0
        )
        found = json.loads((tmp_path / "alone" / "eval_results.json").read_text())
        assert found["eval_loss"] == pytest.approx(trained, rel=1e-4)
        assert (found["eval_samples"], found["eval_skipped"]) == (3, 0)

    @pytest.mark.slow
    def test_do_predict_after_do_train_answers_the_test_rows(self, script, tmp_path):
        flags = FINETUNE.replace("--fp16", "").replace("--predict_with_generate", "--do_predict")
        assert script(flags, *ON_CPU, "--max_target_length", 8).code == 0
        scores = tmp_path / "output" / "adgen-chatglm2-6b-ft-1e-4" / "predict_results.json"
        assert json.loads(scores.read_text())["n"] == 3

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--do_predict",), "needs --test-file FILE"),
            (("--do_eval",), "--do-eval needs validation rows; add --validation-file FILE"),
            (("--do_train",), "no training rows are given; add --train-file FILE"),
            ((), "no training rows are given; add --train-file FILE"),
            (("--do_predict", "--test_file", "/no/such/file"), "file not found: /no/such/file"),
        ],
    )
    def test_each_part_names_the_file_that_it_needs(self, flags, message, glm, toy_native, tmp_path):
        common = ("--model_name_or_path", toy_native, "--output_dir", tmp_path / "out", "--device", "cpu")
        assert message in glm("train", *common, *flags).mistake()
        assert not (tmp_path / "out").exists()
