"""`glm evaluate`. That it asks as the training did: test_train_runs.py. The scores themselves: test_scoring.py."""

import json
import shutil

import pytest

from entrypoints import scoring
from entrypoints.checkpoint.gguf_writing import write_gguf
from entrypoints.checkpoint.manifest import write_manifest
from entrypoints.engines.transformers_engine import TransformersEngine

ROWS = [
    {"content": "类型#裤*材质#牛仔布*颜色#深蓝色*风格#复古", "summary": "好看的裤子"},
    {"content": "裙", "summary": "好看的裙子"},
    {"content": "", "summary": "没有问题"},
    {"content": "类型#衣", "summary": "好看的上衣"},
    {"content": "没有回答", "summary": None},
]
USED = [0, 1, 3]  # places of the usable rows


@pytest.fixture
def evaluate(glm, toy_native, rows_file, tmp_path):
    """Run `glm evaluate` on ROWS; flags given again win."""

    def run(*words):
        file = rows_file(*ROWS, name="test.jsonl")
        common = ("--model", toy_native, "--test-file", file, "--output-dir", tmp_path / "scores", "--device", "cpu")
        return glm("evaluate", *common, "--max-target-length", 4, *words)

    return run


@pytest.fixture
def answers(tmp_path):
    """Read what was written."""

    def read():
        text = (tmp_path / "scores" / "generated_predictions.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    return read


@pytest.fixture
def echo(monkeypatch):
    """Let the model answer each prompt with the given text; the batches it was asked, as numbers of prompts."""
    batches = []

    def say(text):
        def generate_batch(self, prompts, sampling):
            batches.append(len(prompts))
            return [self.tokenizer.encode(text) for _ in prompts]

        monkeypatch.setattr(TransformersEngine, "generate_batch", generate_batch)
        return batches

    return say


def test_stdout_is_the_scores_with_the_count_of_skipped_rows(evaluate, tmp_path):
    done = evaluate()
    scores = json.loads(done.out)
    assert done.code == 0
    assert (scores["n"], scores["n_skipped"]) == (3, 2)
    assert {"bleu_4", "rouge_1", "rouge_2", "rouge_l", "definition"} <= set(scores)
    written = json.loads((tmp_path / "scores" / "predict_results.json").read_text(encoding="utf-8"))
    assert written == {name: value for name, value in scores.items() if name != "n_skipped"}


def test_answers_are_in_the_files_order_with_the_place_of_their_row(evaluate, answers):
    """They are asked in the order of length, longest last; the first row is the longest."""
    evaluate("--per-device-eval-batch-size", 1)
    assert [answer["index"] for answer in answers()] == USED
    assert [answer["line"] for answer in answers()] == [place + 1 for place in USED]
    for answer, place in zip(answers(), USED, strict=True):
        assert (answer["prompt"], answer["reference"]) == (ROWS[place]["content"], ROWS[place]["summary"])
    assert set(answers()[0]) == {"index", "line", "prompt", "reference", "prediction"}


def test_answers_are_the_same_in_any_batch_size(evaluate, answers):
    found = []
    for size in (1, 3):
        evaluate("--per-device-eval-batch-size", size, "--dtype", "float32")
        found.append(answers())
    assert found[0] == found[1]
    assert all(answer["prediction"] for answer in found[0])


def test_answers_are_on_disk_before_they_are_scored(evaluate, answers, monkeypatch):
    """H1: hours of generation must outlive a scorer that fails."""

    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(scoring, "score", fail)
    with pytest.raises(ZeroDivisionError):
        evaluate()
    assert [answer["index"] for answer in answers()] == USED


def test_each_batch_is_on_disk_when_the_next_is_asked(evaluate, echo, monkeypatch, tmp_path):
    echo("好")
    answering, lines = TransformersEngine.generate_batch, []

    def counting(self, prompts, sampling):
        file = tmp_path / "scores" / "generated_predictions.jsonl"
        lines.append(len(file.read_text(encoding="utf-8").splitlines()))
        return answering(self, prompts, sampling)

    monkeypatch.setattr(TransformersEngine, "generate_batch", counting)
    evaluate("--per-device-eval-batch-size", 1)
    assert lines == [0, 1, 2]


def test_a_broken_scorer_is_seen_before_the_model_is_loaded(evaluate, monkeypatch):
    """H2."""
    monkeypatch.setattr(scoring, "KNOWN_SCORES", dict(scoring.KNOWN_SCORES, rouge_l=1.0))
    monkeypatch.setattr(TransformersEngine, "load", None)
    assert "the scorer is off: rouge_l" in evaluate().mistake()


def test_empty_answers_count_as_zero_and_are_counted(evaluate, echo):
    """H1."""
    echo("")
    scores = json.loads(evaluate().out)
    assert (scores["n"], scores["n_empty_predictions"]) == (3, 3)
    assert scores["bleu_4"] == scores["rouge_1"] == scores["rouge_2"] == scores["rouge_l"] == 0


def test_the_reference_as_answer_scores_a_hundred(evaluate, echo, rows_file):
    echo("好看的裤子")
    scores = json.loads(evaluate("--test-file", rows_file(ROWS[0])).out)
    assert scores["bleu_4"] == scores["rouge_1"] == scores["rouge_l"] == 100


def test_bleu_can_count_words_and_says_what_it_counted(evaluate, echo, rows_file):
    """H3. 好看/的/裤子: three words make no 4-gram, five characters do."""
    echo("好看的裤子")
    file = rows_file(ROWS[0])
    words, characters = (
        json.loads(evaluate("--test-file", file, "--bleu-tokens", by).out) for by in ("words", "characters")
    )
    assert (words["bleu_tokens"], characters["bleu_tokens"]) == ("words", "characters")
    assert words["bleu_4"] < characters["bleu_4"] == 100
    assert "jieba words" in words["definition"]


def test_only_the_first_rows_are_answered_if_so_wanted_and_in_batches(evaluate, echo, answers):
    batches = echo("好")
    evaluate("--max-predict-samples", 2, "--per-device-eval-batch-size", 2)
    assert [answer["index"] for answer in answers()] == USED[:2]
    assert batches == [2]


def test_columns_can_be_named_and_a_wrong_one_is_told_with_those_there_are(evaluate, echo, rows_file, answers):
    echo("好")
    file = rows_file({"q": "裙", "a": "好看"})
    assert "no column 'content' and no column 'summary'" in evaluate("--test-file", file).mistake()
    assert evaluate("--test-file", file, "--prompt_column", "q", "--response_column", "a").code == 0
    assert answers()[0]["reference"] == "好看"
    told = evaluate("--test-file", file, "--prompt_column", "q", "--response_column", "a", "--history_column", "h")
    assert "no column 'h'" in told.mistake()


def test_an_adapter_changes_the_answers(golden, golden_native, tmp_path, evaluate, answers, glm, monkeypatch):
    glm("convert", golden / "original-tiny-ptuning", tmp_path / "prefix")
    found = []
    for words in ((), ("--adapter", tmp_path / "prefix")):
        assert evaluate("--model", golden_native, *words, "--dtype", "float32").code == 0
        found.append([answer["prediction"] for answer in answers()])
    monkeypatch.setenv("ADAPTER_PATH", str(tmp_path / "prefix"))
    evaluate("--model", golden_native, "--dtype", "float32")
    assert found[0] != found[1] == [answer["prediction"] for answer in answers()]


def test_the_model_comes_from_the_environment_if_no_flag_names_it(
    glm, toy_native, rows_file, tmp_path, monkeypatch, echo
):
    echo("好")
    words = ("evaluate", "--test-file", rows_file(ROWS[0]), "--output-dir", tmp_path / "scores")
    assert "--model" in glm(*words).mistake()
    monkeypatch.setenv("MODEL_PATH", str(toy_native))
    assert glm(*words).code == 0


def test_a_gguf_file_is_scored_and_asked_as_its_source_was_taught(
    toy_native, tmp_path, glm, rows_file, answers, evaluate
):
    folder = shutil.copytree(toy_native, tmp_path / "native")
    write_manifest(folder, {"columns": {"prompt": "q", "response": "a"}, "max_target_length": 3})
    write_gguf(folder, tmp_path / "toy.gguf", "f16")
    file = rows_file({"q": "裙", "a": "好看"}, {"q": "类型#衣*颜色#蓝", "a": "上衣"}, name="asked.jsonl")
    found = []
    for model in (folder, tmp_path / "toy.gguf"):
        words = ("--model", model, "--test-file", file, "--output-dir", tmp_path / "scores")
        done = glm("evaluate", *words, "--max-target-length", 3)
        assert (done.code, json.loads(done.out or "{}").get("n")) == (0, 2), done.err
        found.append([(answer["prompt"], answer["reference"]) for answer in answers()])
        assert all(answer["prediction"] for answer in answers())
    assert found[0] == found[1] == [("裙", "好看"), ("类型#衣*颜色#蓝", "上衣")]


def test_what_a_gguf_file_cannot_take_is_refused(toy_gguf, evaluate):
    assert "--dtype float32 is not for a GGUF file" in evaluate("--model", toy_gguf, "--dtype", "float32").mistake()
    assert "a GGUF file cannot take adapters" in evaluate("--model", toy_gguf, "--adapter", "mine").mistake()


def test_too_long_prompts_are_told_before_the_first_answer(evaluate, echo, rows_file):
    """The longest come last: hours later it would be too late."""
    batches = echo("好")
    file = rows_file(ROWS[1], {"content": "裙" * 2000, "summary": "好"})
    told = evaluate("--test-file", file, "--max-source-length", 4000, "--per-device-eval-batch-size", 1).mistake()
    assert "the model's window is 1024" in told
    assert batches == []


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (("--model", "/no/such/model"), "/no/such/model is no folder"),
        (("--test-file", "/no/such/file"), "there is no file /no/such/file"),
        (("--per-device-eval-batch-size", 0), "--per-device-eval-batch-size 0 is below 1"),
        (
            ("--max-source-length", 0, "--max-target-length", -1),
            "--max-source-length 0 is below 1; --max-target-length",
        ),
        (("--max-predict-samples", 0), "--max-predict-samples 0 is below 1"),
        (("--max-source-length", 2), "max_source_length 2 does not hold the prompt's frame"),
        (("--output-dir", "/dev/null"), "cannot make --output-dir /dev/null"),
        (("--temperature", 3), "out of bounds: temperature=3"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_that_names_it(words, cause, evaluate):
    assert cause in evaluate(*words).mistake()


def test_a_damaged_model_is_told_before_the_rows_are_read(toy_native, tmp_path, evaluate):
    folder = shutil.copytree(toy_native, tmp_path / "native")
    (folder / "model.safetensors").write_bytes(b"")
    assert "model.safetensors" in evaluate("--model", folder, "--test-file", "/no/such/file").mistake()
