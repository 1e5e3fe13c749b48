"""Results of `glm train`: a self-contained folder, prompted as in training. Errors before a run: test_train.py."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from entrypoints.__main__ import main
from entrypoints.chat_format.prompt import PromptFormat, as_messages
from entrypoints.checkpoint.manifest import read_manifest
from entrypoints.checkpoint.native import open_native
from entrypoints.engines.transformers.engine import TransformersEngine
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.preparation import prepare
from entrypoints.training.rows.collation import RowEncoder
from entrypoints.training.run import build_trainer
from entrypoints.training.run_context import open_run

PREFIX = "写一段文案："
ROWS = [
    {"ask": "那鞋子呢", "say": "小白鞋很百搭。", "before": [["白色衬衫怎么搭配", "配牛仔裤。"]]},
    {"ask": "类型#裙", "say": "好看的裙子。", "before": []},
]
COLUMNS = ("--prompt-column", "ask", "--response-column", "say", "--history-column", "before")
GREEDY = ("--temperature", 0, "--max-new-tokens", 2, "--device", "cpu")


def flags(model: Path, file: Path, output: Path) -> list:
    return ["--model-name-or-path", model, "--train-file", file, "--output-dir", output, "--device", "cpu"]


@pytest.fixture
def train(glm, toy_native, rows_file, tmp_path):
    """Train the tiny model on two rows; repeated flags override the first ones."""

    def run(*words):
        file = rows_file(*ROWS, name="two.jsonl")
        return glm("train", *flags(toy_native, file, tmp_path / "out"), *COLUMNS, "--max-steps", 1, *words)

    return run


@pytest.fixture(scope="module")
def tuned(toy_native, tmp_path_factory):
    """A run with its own prefix and columns, saved after each of its two steps; then its base model is moved away."""
    folder = tmp_path_factory.mktemp("run")
    base = shutil.copytree(toy_native, folder / "base")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = [*flags(base, folder / "rows.jsonl", folder / "tuned"), *COLUMNS, "--source_prefix", PREFIX]
    limits = ["--max-source-length", 80, "--max-target-length", 40]
    assert (
        main(["train", *map(str, [*command, *limits, "--max-steps", 2, "--save-steps", 1, "--logging-steps", 1])]) == 0
    )
    base.rename(folder / "moved away")
    return folder / "tuned"


@pytest.fixture
def asked(monkeypatch):
    """What reaches the model: `prompts`, and `limit`, the maximum tokens of an answer. The answers are empty."""
    seen = SimpleNamespace(prompts=[], limit=None)

    def generate(self, prompt, sampling, *_):
        return (id_ for id_ in generate_batch(self, [prompt], sampling)[0])

    def generate_batch(self, prompts, sampling):
        seen.prompts += [list(prompt) for prompt in prompts]
        seen.limit = sampling.max_new_tokens
        return [[] for _ in prompts]

    monkeypatch.setattr(TransformersEngine, "generate", generate)
    monkeypatch.setattr(TransformersEngine, "generate_batch", generate_batch)
    return seen


def training_prompt(row: dict, folder: Path) -> list[int]:
    """The token ids before the answer in the encoded training row."""
    tokenizer = open_native(folder).tokenizer
    encoder = RowEncoder(tokenizer, PromptFormat("chatglm3", PREFIX), 80, 40)
    ids = encoder({"prompt": row["ask"], "response": row["say"], "history": row["before"]})["input_ids"]
    cue = len(ids) - ids[::-1].index(tokenizer.special_token_id("<|assistant|>"))
    return ids[:cue]


def test_the_result_and_every_checkpoint_load_and_generate_without_the_base_model(tuned, glm):
    """The folder of the base model has been moved away."""
    assert glm("verify", tuned).code == 0
    checkpoints = sorted(tuned.glob("checkpoint-*"))
    assert [folder.name for folder in checkpoints] == ["checkpoint-1", "checkpoint-2"]
    for folder in (tuned, *checkpoints):
        assert glm("chat", "--model", folder, "--prompt", "你好", *GREEDY, "--verify").code == 0


def test_the_prompt_format_is_stored_with_the_weights(tuned):
    for folder in (tuned, tuned / "checkpoint-1"):
        stored = json.loads((folder / "prompt.json").read_text(encoding="utf-8"))
        assert stored == {"template": "chatglm3", "source_prefix": PREFIX, "family": "chatglm3"}


def test_chat_prompts_with_the_token_ids_of_training_and_the_source_prefix(tuned, asked, glm):
    glm("chat", "--model", tuned, "--prompt", ROWS[1]["ask"], *GREEDY)
    assert asked.prompts == [training_prompt(ROWS[1], tuned)]


def test_evaluate_uses_the_columns_history_and_limits_of_training(tuned, asked, rows_file, tmp_path, glm):
    """The command names the test file alone."""
    file = rows_file(*ROWS)
    done = glm(
        "evaluate", "--model", tuned, "--test-file", file, "--output-dir", tmp_path / "scores", "--device", "cpu"
    )
    assert done.code == 0
    assert sorted(asked.prompts) == sorted(training_prompt(row, tuned) for row in ROWS)
    assert asked.limit == 40
    columns = read_manifest(tuned)["provenance"]["columns"]
    assert columns == {"prompt": "ask", "response": "say", "history": "before"}


def test_evaluate_accepts_rows_without_the_history_column(tuned, asked, rows_file, tmp_path, glm):
    row = {"ask": "类型#裙", "say": "好看的裙子。"}
    done = glm("evaluate", "--model", tuned, "--test-file", rows_file(row), "--output-dir", tmp_path / "scores")
    assert done.code == 0
    assert asked.prompts == [training_prompt(ROWS[1], tuned)]


def test_a_validation_file_may_lack_the_history_column_and_the_training_rows_may_not(train, rows_file, tmp_path):
    """`glm data split` puts rows with a history into one of its files only, if there are few."""
    plain = rows_file({"ask": "类型#裙", "say": "好看的裙子。"}, name="plain.jsonl")
    done = train("--validation-file", plain, "--train-file", rows_file(*ROWS))
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text(encoding="utf-8"))["eval_loss"] > 0
    message = "no column 'before' in plain.jsonl; columns: ask, say"
    assert message in train("--overwrite-output-dir", "--train-file", plain).mistake()


def test_a_fine_tuned_folder_is_fine_tuned_again_with_its_own_prefix(tuned, train, tmp_path):
    done = train("--model-name-or-path", tuned)
    assert done.code == 0
    assert json.loads((tmp_path / "out" / "prompt.json").read_text(encoding="utf-8"))["source_prefix"] == PREFIX


def test_stdout_contains_only_the_output_folder_and_the_weights_have_changed(train, toy_native, tmp_path):
    done = train("--learning-rate", 1e-2)
    assert (done.code, done.out) == (0, f"{tmp_path / 'out'}\n")
    before, after = (load_file(folder / "model.safetensors") for folder in (toy_native, tmp_path / "out"))
    assert set(before) == set(after)
    assert {name: tensor.dtype for name, tensor in before.items()} == {
        name: tensor.dtype for name, tensor in after.items()
    }
    assert not all(before[name].equal(after[name]) for name in before)


@pytest.mark.slow
def test_the_other_template_precision_and_memory_flags_work_together_and_all_logs_are_json(train, tmp_path):
    done = train(
        "--log-format", "json", "--logging-steps", 1,
        "--template", "round", "--bf16", "--gradient-checkpointing", "--gradient-accumulation-steps", 2,
        "--history-column", "before", "--max-train-samples", 1, "--lr-scheduler-type", "cosine", "--warmup-steps", 1,
    )  # fmt: skip
    assert done.code == 0
    assert open_native(tmp_path / "out", verify=True).prompt_format.template == "round"
    assert any("loss" in json.loads(line)["message"] for line in done.err.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("count", [35, 1])
def test_validation_rows_of_any_number_give_a_loss(count, train, rows_file):
    done = train("--validation-file", rows_file(*[ROWS[1] | {"before": []}] * count, name="dev.jsonl"))
    assert done.code == 0
    assert "eval_loss" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("method", [("lora",), ("ptuning", "--pre-seq-len", 4)], ids=lambda words: words[0])
def test_validation_rows_give_a_loss_with_an_adapter(method, train, rows_file):
    """The Trainer would look for labels in the signature of the model, which a prefix model does not have."""
    done = train("--method", *method, "--validation-file", rows_file(ROWS[1], name="dev.jsonl"))
    assert done.code == 0
    assert "eval_loss" in done.err


def test_an_empty_validation_file_disables_validation_with_a_warning(train, tmp_path):
    (tmp_path / "dev.jsonl").write_bytes(b"")
    done = train("--validation-file", tmp_path / "dev.jsonl")
    assert done.code == 0
    assert f"{tmp_path / 'dev.jsonl'} is empty: no evaluation" in done.err
    assert "eval_loss" not in done.err


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--logging-steps", 1), ()], ids=["logged", "before the first log line"])
def test_a_loss_that_is_not_finite_ends_the_run(flags, train, tmp_path):
    message = train("--learning-rate", 1e30, "--max-steps", 3, *flags).mistake()
    assert "the loss was nan in 2 consecutive steps, up to step 3" in message
    assert "lower --learning-rate" in message
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_test_rows_are_answered_and_scored_at_the_end(train, rows_file, tmp_path, glm):
    done = train(
        "--predict-with-generate", "--test-file", rows_file(*ROWS, name="test.jsonl"), "--max-target-length", 8
    )
    assert done.code == 0
    answers = (tmp_path / "out" / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prompt"] for line in answers] == [row["ask"] for row in ROWS]
    assert json.loads((tmp_path / "out" / "predict_results.json").read_text(encoding="utf-8"))["n"] == 2
    assert glm("verify", tmp_path / "out").code == 0


@pytest.mark.slow
def test_conversations_with_tools_are_trained_with_packing_and_tested_with_the_prompt_of_the_api(
    glm, toy_native, rows_file, asked, tmp_path
):
    """Before the answer: schema of the tool, its call and its observation, in the order of the API."""
    tool = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    turns = [
        {"role": "system", "content": "查天气", "tools": [tool]},
        {"role": "user", "content": "北京天气"},
        {"role": "assistant", "metadata": "get_weather", "content": "```python\ntool_call(city='北京')\n```"},
        {"role": "observation", "content": "31度"},
        {"role": "assistant", "content": "北京31度。"},
    ]
    file = rows_file({"talk": turns}, {"talk": turns[1:2] + turns[4:]})
    words = [*flags(toy_native, file, tmp_path / "out"), "--conversations-column", "talk", "--packing"]
    done = glm("train", *words, "--max-steps", 2, "--test-file", file, "--predict-with-generate")
    assert done.code == 0, done.err
    tokenizer = open_native(toy_native).tokenizer
    assert PromptFormat().encode(as_messages(turns[:-1]), tokenizer) in asked.prompts


def test_rows_of_similar_length_share_a_batch(toy_native, tmp_path):
    """128 short and 128 long rows, shuffled by the sampler: at most one batch in eight mixes them."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"content": "裙" * (1 + 40 * (n % 2)), "summary": "好"}) + "\n" for n in range(256))
    )
    arguments = TrainArguments(toy_native, rows, tmp_path / "out", per_device_train_batch_size=4, device="cpu")
    trainer = build_trainer(prepare(open_run(arguments, None)))
    masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
    assert sum(len(mask) for mask in masks) == 256
    mixed = sum(len(set(mask.sum(1).tolist())) > 1 for mask in masks)
    assert mixed <= len(masks) / 8


@pytest.mark.slow
def test_the_loss_falls_on_real_rows(golden, golden_native, tmp_path, glm):
    """Public ADGEN rows and the real vocabulary; 11.1 is the loss of a uniform distribution over 65024 ids."""
    words = ["--max-train-samples", 64, "--max-source-length", 32, "--max-target-length", 24]
    steps = ["--max-steps", 18, "--logging-steps", 6, "--learning-rate", 1e-2]
    assert glm("train", *flags(golden_native, golden / "adgen_dev.json", tmp_path / "out"), *words, *steps).code == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 3
    assert 11.5 > losses[0] > losses[1] > losses[2]
    assert losses[2] < 8


def test_the_result_is_checked_on_the_device_of_the_training(glm, toy_native, rows_file, tmp_path, monkeypatch):
    """Also when DEVICE selects it: another device may not have enough memory."""
    devices = []
    load = TransformersEngine.load

    def loading(model, options):
        devices.append(options.device)
        return load(model, options)

    monkeypatch.setattr(TransformersEngine, "load", loading)
    monkeypatch.setenv("DEVICE", "cpu")
    arguments = flags(toy_native, rows_file({"content": "裙", "summary": "好"}), tmp_path / "out")[:-2]
    assert "--device" not in arguments
    assert glm("train", *arguments, "--max-steps", 1).code == 0
    assert devices == ["cpu"]
