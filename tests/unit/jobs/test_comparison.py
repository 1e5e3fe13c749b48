"""`glm evaluate` with several models: base beside tuned beside 4 bits, in one table."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from entrypoints.evaluation.comparison import Evaluated, most_different_rows, read_predictions, write_comparison
from entrypoints.evaluation.metrics import score
from entrypoints.evaluation.predict import Prediction
from entrypoints.evaluation.predict import evaluate as evaluate_predictions
from entrypoints.jobs import evaluate


@pytest.fixture(scope="module")
def rows(tmp_path_factory, sample_rows):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sample_rows[:4]), encoding="utf-8")
    return file


@pytest.fixture
def tuned(glm, toy_native, rows, tmp_path):
    """A LoRA that was trained hard enough to answer differently."""
    flags = ["--method", "lora", "--learning-rate", 0.05, "--max-steps", 3, "--max-target-length", 64]
    common = ["--model-name-or-path", toy_native, "--train-file", rows, "--output-dir", tmp_path / "tuned"]
    assert glm("train", *common, *flags, "--device", "cpu").code == 0
    return tmp_path / "tuned"


@pytest.mark.slow
def test_base_tuned_and_quantized_are_in_one_table(glm, toy_native, toy_gguf, tuned, rows, tmp_path):
    models = ["--model", toy_native, "--model", tuned, "--model", toy_gguf]
    flags = ["--test-file", rows, "--output-dir", tmp_path / "compared", "--device", "cpu", "--max-target-length", 8]
    done = glm("evaluate", *models, *flags)
    assert done.code == 0, done.err
    table = [re.split(r" *\| *", line.strip("| ")) for line in done.out.splitlines() if line.startswith("| ")]
    names = [toy_native.name, "tuned", toy_gguf.stem]
    assert [line[0] for line in table] == ["model", "---", *names]
    values = json.loads((tmp_path / "compared" / "comparison.json").read_text(encoding="utf-8"))
    assert [*values] == names
    for line in table[2:]:
        single = json.loads((tmp_path / "compared" / line[0] / "predict_results.json").read_text(encoding="utf-8"))
        assert line[1:5] == [f"{single[name]:.1f}" for name in ("bleu_4", "rouge_1", "rouge_2", "rouge_l")]
        assert {name: values[line[0]][name] for name in single} == single
        assert values[line[0]]["seconds"] > 0
    answers = {name: (tmp_path / "compared" / name / "generated_predictions.jsonl").read_text() for name in names}
    assert answers["tuned"] != answers[toy_native.name]
    for file in ("comparison.md", "comparison.html"):
        text = (tmp_path / "compared" / file).read_text(encoding="utf-8")
        assert "tuned" in text
        assert "characters: mean length of an answer; length ratio:" in text
    again = glm("evaluate", *models[:4], *flags)
    assert "kept in" in again.err
    assert (tmp_path / "compared" / "tuned" / "earlier-1" / "predict_results.json").is_file()


def test_a_folder_and_a_file_of_one_name_are_told_apart():
    models = [Path("a/tuned"), Path("tuned.gguf"), Path("b/tuned"), Path("other.gguf")]
    assert evaluate._names(models) == ["tuned-1", "tuned.gguf", "tuned-2", "other"]


@pytest.mark.slow
def test_a_base_model_is_asked_with_the_limits_of_the_tuned_one(glm, toy_native, tuned, rows, tmp_path, monkeypatch):
    """It has none of its own: the answers would have other lengths."""
    limits = []

    def generate_batch(self, prompts, sampling):
        limits.append(sampling.max_new_tokens)
        return [[] for _ in prompts]

    monkeypatch.setattr("entrypoints.engines.transformers.engine.TransformersEngine.generate_batch", generate_batch)
    flags = ["--test-file", rows, "--output-dir", tmp_path / "out", "--device", "cpu"]
    assert glm("evaluate", "--model", toy_native, "--model", tuned, *flags).code == 0
    assert limits == [64, 64]


@pytest.mark.slow
def test_loading_an_adapter_prints_no_warning_of_a_library(toy_native, tuned, rows, tmp_path):
    """In a process of its own: the settings of these tests hide the warning."""
    words = ["--model", toy_native, "--adapter", tuned, "--test-file", rows, "--output-dir", tmp_path / "out"]
    command = [sys.executable, "-m", "entrypoints", "evaluate", *words, "--device", "cpu", "--max-target-length", "1"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert "Warning" not in done.stderr


def test_one_adapter_flag_and_several_models_exclude_each_other(glm, toy_native, rows, tmp_path):
    models = ["--model", toy_native, "--model", toy_native, "--adapter", toy_native]
    mistake = glm("evaluate", *models, "--test-file", rows, "--output-dir", tmp_path / "out").mistake()
    assert "--adapter is for one model; name the adapter with --model, after its base model" in mistake


def test_an_adapter_without_its_base_is_an_error(glm, toy_gguf, tuned, rows, tmp_path):
    models = ["--model", tuned, "--model", toy_gguf]
    mistake = glm("evaluate", *models, "--test-file", rows, "--output-dir", tmp_path / "out").mistake()
    assert f"{tuned} is an adapter; also name its base model: --model BASE" in mistake


def test_a_damaged_second_model_is_reported_before_the_first_is_loaded(glm, toy_native, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("entrypoints.engines.loading.load_engine", lambda *_: pytest.fail("loaded a model"))
    models = ["--model", toy_native, "--model", tmp_path / "absent"]
    mistake = glm("evaluate", *models, "--test-file", rows, "--output-dir", tmp_path / "out").mistake()
    assert "absent" in mistake


def test_two_models_of_the_same_name_have_two_rows(glm, toy_native, rows, tmp_path):
    models = ["--model", toy_native, "--model", toy_native]
    flags = ["--test-file", rows, "--output-dir", tmp_path / "out", "--device", "cpu", "--max-target-length", 2]
    out = glm("evaluate", *models, *flags).out
    assert [f"| {toy_native.name}-{number} |" in out for number in (1, 2)] == [True, True]


def test_answers_with_separators_of_other_lines_are_read_back(tmp_path):
    """Unicode has more ends of a line than JSON Lines."""
    answers = [Prediction(0, 1, "问\u2028题", "a\u2029b\x85c\x0b", "\x1cx\r\ny"), Prediction(1, 2, "q", "r", "\ud83d")]
    evaluate_predictions(answers, tmp_path)
    assert read_predictions(tmp_path) == answers


def evaluated(name, *answers):
    references = ["今天的天气很好", "这条裙子是蓝色的", "衣服很舒服"]
    found = [Prediction(n, n + 1, f"q{n}", references[n], answer) for n, answer in enumerate(answers)]
    return Evaluated(name, score([*answers], references[: len(answers)]).as_dict(), 1.5, found)


def test_the_rows_that_differ_most_come_first_and_equal_ones_are_omitted(tmp_path):
    one = evaluated("one", "今天的天气很好", "这条裙子是蓝色的", "衣服")
    two = evaluated("two", "今天的天气不好", "完全不同的回答", "衣服")
    assert [row for row, _ in most_different_rows([one, two])] == [1, 0]
    write_comparison([one, two], tmp_path / "dev.jsonl", tmp_path)
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert text.index("## Line 2") < text.index("## Line 1")
    assert "## Line 3" not in text


def test_an_answer_with_markup_stays_text_in_both_files(tmp_path):
    one, two = evaluated("a|b", "<script>alert(1)</script>"), evaluated("two", "今天的天气很好")
    write_comparison([one, two], tmp_path / "dev.jsonl", tmp_path)
    assert "<script>" not in (tmp_path / "comparison.html").read_text() + (tmp_path / "comparison.md").read_text()
    assert "| a\\|b |" in (tmp_path / "comparison.md").read_text()
