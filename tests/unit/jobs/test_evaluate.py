"""`glm evaluate`. Prompts as in training: test_train_runs.py. Scores: evaluation/test_metrics.py."""

import json
import re
import shutil
import sys

import pytest

from entrypoints.checkpoint.manifest import write_manifest
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.evaluation import metrics
from entrypoints.quantization.gguf_writer import write_gguf

ROWS = [
    {"content": "类型#裤*材质#牛仔布*颜色#深蓝色*风格#复古", "summary": "好看的裤子"},
    {"content": "裙", "summary": "好看的裙子"},
    {"content": "", "summary": "没有问题"},
    {"content": "类型#衣", "summary": "好看的上衣"},
    {"content": "没有回答", "summary": None},
]
USED = [0, 1, 3]  # indexes of the usable rows


@pytest.fixture
def evaluate(glm, toy_native, rows_file, tmp_path):
    """Run `glm evaluate` on ROWS with the tiny model, or another --model; later flags override."""

    def run(*flags):
        file = rows_file(*ROWS, name="test.jsonl")
        common = ("--test-file", file, "--output-dir", tmp_path / "scores", "--device", "cpu")
        model = () if "--model" in flags else ("--model", toy_native)
        return glm("evaluate", *model, *common, "--max-target-length", 4, *flags)

    return run


@pytest.fixture
def answers(tmp_path):
    """Read the predictions."""

    def read():
        text = (tmp_path / "scores" / "generated_predictions.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    return read


@pytest.fixture
def echo(monkeypatch):
    """Make the model answer every prompt with a given text; returns the sizes of the batches."""
    batches = []

    def answer_with(text):
        def generate_batch(self, prompts, sampling):
            batches.append(len(prompts))
            return [self.tokenizer.encode(text) for _ in prompts]

        monkeypatch.setattr(TransformersEngine, "generate_batch", generate_batch)
        return batches

    return answer_with


def test_stdout_has_the_scores_and_the_number_of_skipped_rows(evaluate, tmp_path):
    done = evaluate()
    scores = json.loads(done.out)
    assert done.code == 0
    assert (scores["n"], scores["n_skipped"]) == (3, 2)
    assert {"bleu_4", "rouge_1", "rouge_2", "rouge_l", "definition"} <= set(scores)
    written = json.loads((tmp_path / "scores" / "predict_results.json").read_text(encoding="utf-8"))
    assert written == scores
    assert "1 row cannot be used" not in done.err
    assert "test.jsonl:3: empty prompt; 2 rows cannot be used" in evaluate("--max-skipped", 1).mistake()


def test_predictions_are_in_row_order_with_the_position_of_their_row(evaluate, answers):
    """Prompts are processed by length, longest last; the first row is the longest."""
    evaluate("--per-device-eval-batch-size", 1)
    assert [answer["index"] for answer in answers()] == USED
    assert [answer["line"] for answer in answers()] == [index + 1 for index in USED]
    for answer, index in zip(answers(), USED, strict=True):
        assert (answer["prompt"], answer["reference"]) == (ROWS[index]["content"], ROWS[index]["summary"])
    assert set(answers()[0]) == {"index", "line", "prompt", "reference", "prediction"}


def test_predictions_do_not_depend_on_the_batch_size(evaluate, answers):
    found = []
    for size in (1, 3):
        evaluate("--per-device-eval-batch-size", size, "--dtype", "float32")
        found.append(answers())
    assert found[0] == found[1]
    assert all(answer["prediction"] for answer in found[0])


def test_predictions_are_on_disk_before_they_are_scored(evaluate, answers, monkeypatch):
    """Hours of generation must not be lost if scoring fails."""

    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(metrics, "score", fail)
    with pytest.raises(ZeroDivisionError):
        evaluate()
    assert [answer["index"] for answer in answers()] == USED


def test_each_batch_is_on_disk_before_the_next_one_starts(evaluate, echo, monkeypatch, tmp_path):
    echo("好")
    answering, lines = TransformersEngine.generate_batch, []

    def counting(self, prompts, sampling):
        file = tmp_path / "scores" / "generated_predictions.jsonl"
        lines.append(len(file.read_text(encoding="utf-8").splitlines()))
        return answering(self, prompts, sampling)

    monkeypatch.setattr(TransformersEngine, "generate_batch", counting)
    evaluate("--per-device-eval-batch-size", 1)
    assert lines == [0, 1, 2]


def test_the_results_of_earlier_runs_are_kept(evaluate, echo, tmp_path):
    written = []
    for text in ("好", "好看", "好看的裤子"):
        echo(text)
        done = evaluate()
        assert done.code == 0, done.err
        names = ("generated_predictions.jsonl", "predict_results.json")
        written.append([(tmp_path / "scores" / name).read_bytes() for name in names])
    assert f"the results of the run before are kept in {tmp_path / 'scores' / 'earlier-2'}" in done.err
    assert len({contents[0] for contents in written}) == 3
    for number in (1, 2):
        assert [(tmp_path / "scores" / f"earlier-{number}" / name).read_bytes() for name in names] == written[
            number - 1
        ]


def test_results_are_not_written_into_the_folder_of_a_model(evaluate, echo, toy_native, tmp_path):
    batches = echo("好")
    model = shutil.copytree(toy_native, tmp_path / "model")
    before = sorted(path.name for path in model.iterdir())
    error = evaluate("--output-dir", model).mistake()
    assert error.endswith(f"{model} is the folder of a model or adapter; use one of its own: {model / 'scores'}")
    assert sorted(path.name for path in model.iterdir()) == before
    assert batches == []
    assert evaluate("--output-dir", model / "scores").code == 0


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, "answers: 100%"), (False, "2 of 3 rows are answered")])
def test_the_progress_is_shown_on_stderr(is_terminal, shown, evaluate, echo, monkeypatch):
    echo("好")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    done = evaluate()
    assert shown in done.err
    assert json.loads(done.out)["n"] == 3


def test_empty_answers_score_zero_and_are_counted(evaluate, echo):
    echo("")
    scores = json.loads(evaluate().out)
    assert (scores["n"], scores["n_empty_predictions"]) == (3, 3)
    assert scores["bleu_4"] == scores["rouge_1"] == scores["rouge_2"] == scores["rouge_l"] == 0


def test_the_reference_as_answer_scores_100(evaluate, echo, rows_file):
    echo("好看的裤子")
    scores = json.loads(evaluate("--test-file", rows_file(ROWS[0])).out)
    assert scores["bleu_4"] == scores["rouge_1"] == scores["rouge_l"] == 100


TOOL = {"name": "get_weather", "description": "天气", "parameters": {"type": "object"}}
CALL = {"function": {"name": "get_weather", "arguments": {"city": "北京", "max-results": 5}}}


@pytest.mark.parametrize(
    ("tools", "content", "segments"),
    [
        ([TOOL], None, ["get_weather\n```python\ntool_call(**{'city': '北京', 'max-results': 5})\n```"]),
        ([], None, ["get_weather\n```python\ntool_call(**{'city': '北京', 'max-results': 5})\n```"]),
        ([TOOL], None, ['get_weather\n```python\ntool_call(city="北京", **{"max-results": 5})\n```']),
        ([TOOL], "稍等", ["\n稍等", "get_weather\n```python\ntool_call(**{'city': '北京', 'max-results': 5})\n```"]),
    ],
    ids=["as written", "without tools", "in other quotes", "after a text"],
)
def test_a_perfect_tool_call_scores_100(tools, content, segments, evaluate, monkeypatch, rows_file, answers):
    """The model generates the name of the tool as a header, which the code in the row does not contain."""

    def generate_batch(self, prompts, sampling):
        tag, ids = self.tokenizer.special_token_id("<|assistant|>"), []
        for number, segment in enumerate(segments):
            head, _, body = segment.partition("\n")
            ids += [tag] * bool(number) + self.tokenizer.encode(f"{head}\n") + self.tokenizer.encode(body)
        return [ids for _ in prompts]

    monkeypatch.setattr(TransformersEngine, "generate_batch", generate_batch)
    answer = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    file = rows_file({"messages": [{"role": "user", "content": "北京天气"}, answer], "tools": tools})
    scores = json.loads(evaluate("--test-file", file).out)
    assert (scores["bleu_4"], scores["rouge_1"], scores["rouge_l"]) == (100, 100, 100)
    assert answers()[0]["prediction"] == answers()[0]["reference"]
    assert "get_weather" in answers()[0]["reference"]


def test_a_call_of_another_tool_or_with_other_arguments_scores_less(evaluate, echo, rows_file):
    file = rows_file(
        {"messages": [{"role": "user", "content": "北京天气"}, {"role": "assistant", "tool_calls": [CALL]}]}
    )
    for text in (
        "get_time\n```python\ntool_call(city='北京')\n```",
        "get_weather\n```python\ntool_call(city='上海')\n```",
    ):
        echo(text)
        assert 0 < json.loads(evaluate("--test-file", file).out)["bleu_4"] < 100


def test_bleu_can_use_words_and_the_scores_name_the_tokens(evaluate, echo, rows_file):
    """好看/的/裤子: three words have no 4-gram, five characters have."""
    echo("好看的裤子")
    file = rows_file(ROWS[0])
    words, characters = (
        json.loads(evaluate("--test-file", file, "--bleu-tokens", by).out) for by in ("words", "characters")
    )
    assert (words["bleu_tokens"], characters["bleu_tokens"]) == ("words", "characters")
    assert words["bleu_4"] < characters["bleu_4"] == 100
    assert "jieba words" in words["definition"]


def test_max_predict_samples_answers_the_first_rows_in_batches(evaluate, echo, answers):
    batches = echo("好")
    evaluate("--max-predict-samples", 2, "--per-device-eval-batch-size", 2)
    assert [answer["index"] for answer in answers()] == USED[:2]
    assert batches == [2]


def test_columns_can_be_named_and_a_wrong_name_is_reported(evaluate, echo, rows_file, answers):
    echo("好")
    file = rows_file({"q": "裙", "a": "好看"})
    assert "no column 'content' and no column 'summary'" in evaluate("--test-file", file).mistake()
    assert evaluate("--test-file", file, "--prompt_column", "q", "--response_column", "a").code == 0
    assert answers()[0]["reference"] == "好看"
    done = evaluate("--test-file", file, "--prompt_column", "q", "--response_column", "a", "--history_column", "h")
    assert "no column 'h'" in done.mistake()


@pytest.mark.slow
def test_an_adapter_changes_the_answers(golden, golden_native, tmp_path, evaluate, answers, glm, monkeypatch):
    glm("convert", golden / "original-tiny-ptuning", tmp_path / "prefix")
    found = []
    for flags in ((), ("--adapter", tmp_path / "prefix")):
        assert evaluate("--model", golden_native, *flags, "--dtype", "float32").code == 0
        found.append([answer["prediction"] for answer in answers()])
    monkeypatch.setenv("ADAPTER_PATH", str(tmp_path / "prefix"))
    evaluate("--model", golden_native, "--dtype", "float32")
    assert found[0] != found[1] == [answer["prediction"] for answer in answers()]


def test_the_model_comes_from_the_environment_if_no_flag_names_it(
    glm, toy_native, rows_file, tmp_path, monkeypatch, echo
):
    echo("好")
    command = ("evaluate", "--test-file", rows_file(ROWS[0]), "--output-dir", tmp_path / "scores")
    assert "--model" in glm(*command).mistake()
    monkeypatch.setenv("MODEL_PATH", str(toy_native))
    assert glm(*command).code == 0


def test_a_gguf_file_is_scored_with_the_columns_and_format_of_its_source(
    toy_native, tmp_path, glm, rows_file, answers, evaluate
):
    folder = shutil.copytree(toy_native, tmp_path / "native")
    write_manifest(folder, {"columns": {"prompt": "q", "response": "a"}, "max_target_length": 3})
    write_gguf(folder, tmp_path / "toy.gguf", "f16")
    file = rows_file({"q": "裙", "a": "好看"}, {"q": "类型#衣*颜色#蓝", "a": "上衣"}, name="other-columns.jsonl")
    found = []
    for model in (folder, tmp_path / "toy.gguf"):
        flags = ("--model", model, "--test-file", file, "--output-dir", tmp_path / "scores")
        done = glm("evaluate", *flags, "--max-target-length", 3)
        assert (done.code, json.loads(done.out or "{}").get("n")) == (0, 2), done.err
        found.append([(answer["prompt"], answer["reference"]) for answer in answers()])
        assert all(answer["prediction"] for answer in answers())
    assert found[0] == found[1] == [("裙", "好看"), ("类型#衣*颜色#蓝", "上衣")]


def test_options_that_a_gguf_file_does_not_support_are_rejected(toy_gguf, evaluate):
    assert (
        "--dtype float32 is not supported for a GGUF file"
        in evaluate("--model", toy_gguf, "--dtype", "float32").mistake()
    )
    assert "a GGUF file does not support adapters" in evaluate("--model", toy_gguf, "--adapter", "mine").mistake()


@pytest.fixture
def no_loading(monkeypatch):
    monkeypatch.setattr("entrypoints.engines.loading.load_engine", lambda *_: pytest.fail("loaded a model"))


@pytest.mark.parametrize("model", ["toy_native", "toy_gguf"])
def test_too_long_prompts_are_reported_before_the_model_is_loaded(model, evaluate, rows_file, no_loading, request):
    file = rows_file(ROWS[1], {"content": "裙" * 2000, "summary": "好"})
    flags = ("--model", request.getfixturevalue(model), "--test-file", file, "--max-source-length", 4000)
    done = evaluate(*flags, "--per-device-eval-batch-size", 1).mistake()
    assert f"{file}:2: the longest prompt has " in done
    assert "the context length is 1024; lower --max-source-length to at most 1023" in done


LONG_SYSTEM = [{"role": "system", "content": "规" * 300}, {"role": "user", "content": "裙"}]
TALK = [
    {"messages": [*turns, {"role": "assistant", "content": "好"}]}
    for turns in (LONG_SYSTEM[1:], LONG_SYSTEM, LONG_SYSTEM[1:])
]


def test_a_row_whose_system_text_is_too_long_is_skipped_and_counted(evaluate, echo, rows_file, answers):
    echo("好")
    flags = ("--test-file", rows_file(*TALK), "--max-source-length", 64)
    done = evaluate(*flags)
    assert [json.loads(done.out)[name] for name in ("n", "n_skipped")] == [2, 1]
    assert [answer["line"] for answer in answers()] == [1, 3]
    assert "rows.jsonl:2: --max-source-length 64 does not hold the prompt's system text" in done.err
    assert json.loads(evaluate(*flags, "--max-predict-samples", 1).out)["n_skipped"] == 0


def test_max_skipped_refuses_a_row_whose_system_text_is_too_long_before_the_model_is_loaded(
    evaluate, rows_file, no_loading
):
    done = evaluate("--test-file", rows_file(*TALK), "--max-source-length", 64, "--max-skipped", 0).mistake()
    assert re.search(r"rows.jsonl:2: .*; set --max-source-length \d+, or allow them with --max-skipped 1$", done)


def test_models_are_compared_on_the_rows_that_both_can_answer(evaluate, echo, rows_file, toy_native, tmp_path):
    """The prefix of one of them leaves less room."""
    echo("好")
    other = shutil.copytree(toy_native, tmp_path / "other")
    (other / "manifest.json").unlink()
    prompt = json.loads((other / "prompt.json").read_text(encoding="utf-8"))
    prompt["source_prefix"] = "请认真回答下面的问题：" * 9
    (other / "prompt.json").write_text(json.dumps(prompt), encoding="utf-8")
    short = {"messages": [{"role": "system", "content": "规" * 9}, *TALK[0]["messages"]]}
    system = {"messages": [{"role": "system", "content": "规" * 40}, *TALK[0]["messages"]]}
    flags = ("--test-file", rows_file(short, system), "--max-source-length", 220, "--model", toy_native)
    done = evaluate(*flags, "--model", other)
    values = json.loads((tmp_path / "scores" / "comparison.json").read_text(encoding="utf-8"))
    assert [(one["n"], one["n_skipped"]) for one in values.values()] == [(1, 1), (1, 1)], done.err
    assert f"{toy_native}: 1 rows are skipped because another model cannot answer them" in done.err


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (("--model", "/no/such/model"), "folder not found: /no/such/model"),
        (("--test-file", "/no/such/file"), "file not found: /no/such/file"),
        (("--per-device-eval-batch-size", 0), "--per-device-eval-batch-size 0 is below 1"),
        (
            ("--max-source-length", 0, "--max-target-length", -1),
            "--max-source-length 0 is below 1; --max-target-length",
        ),
        (("--max-predict-samples", 0), "--max-predict-samples 0 is below 1"),
        (("--max-source-length", 2), "--max-source-length 2 does not hold the prompt's system"),
        (("--output-dir", "/dev/null"), "cannot create --output-dir /dev/null"),
        (("--temperature", 3), "out of bounds: temperature=3"),
    ],
    ids=str,
)
def test_a_user_error_is_one_line_with_the_cause(flags, cause, evaluate):
    assert cause in evaluate(*flags).mistake()


@pytest.mark.parametrize("model", ["damaged", "damaged.gguf", "missing", "missing.gguf"])
def test_rows_are_checked_before_the_model(model, toy_native, tmp_path, evaluate, rows_file):
    """They are the user's own, and their mistakes take longest to fix."""
    path = tmp_path / model
    if model == "damaged":
        shutil.copytree(toy_native, path)
        (path / "model.safetensors").write_bytes(b"")
    elif model == "damaged.gguf":
        path.write_bytes(b"GGUF")
    unusable = rows_file({"content": "a", "summary": ""}, name="unusable.jsonl")
    assert "file not found: /no/such/file" in evaluate("--model", path, "--test-file", "/no/such/file").mistake()
    if model != "damaged.gguf":  # its columns are not known
        assert "no usable row in unusable.jsonl" in evaluate("--model", path, "--test-file", unusable).mistake()
    assert {"damaged": "model.safetensors"}.get(model, model) in evaluate("--model", path).mistake()
