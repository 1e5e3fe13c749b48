"""What `glm train` makes: a folder that works alone, asked as it was taught. What it refuses: test_train.py."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from transformers import Trainer

from entrypoints.__main__ import main
from entrypoints.checkpoint.manifest import read_manifest
from entrypoints.checkpoint.native import open_native
from entrypoints.engines.transformers_engine import TransformersEngine
from entrypoints.prompt import PromptFormat, as_messages
from entrypoints.training import trainer
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.batches import RowEncoder

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
    """Train the toy on two rows; flags given again win."""

    def run(*words):
        file = rows_file(*ROWS, name="two.jsonl")
        return glm("train", *flags(toy_native, file, tmp_path / "out"), *COLUMNS, "--max-steps", 1, *words)

    return run


@pytest.fixture(scope="module")
def tuned(toy_native, tmp_path_factory):
    """One run with a prefix and columns of its own, saved after each of its two steps; then its base is moved away."""
    folder = tmp_path_factory.mktemp("run")
    base = shutil.copytree(toy_native, folder / "base")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = [*flags(base, folder / "rows.jsonl", folder / "tuned"), *COLUMNS, "--source_prefix", PREFIX]
    limits = ["--max-source-length", 80, "--max-target-length", 40]
    assert main(["train", *map(str, [*words, *limits, "--max-steps", 2, "--save-steps", 1, "--logging-steps", 1])]) == 0
    base.rename(folder / "moved away")
    return folder / "tuned"


@pytest.fixture
def asked(monkeypatch):
    """What reaches the model: `prompts`, and the `limit` of the answer's tokens. It answers nothing."""
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


def learnt_prompt(row: dict, folder: Path) -> list[int]:
    """The ids in front of the answer in the row that training sees."""
    tokenizer = open_native(folder).tokenizer
    encoder = RowEncoder(tokenizer, PromptFormat("chatglm3", PREFIX), 80, 40)
    ids = encoder({"prompt": row["ask"], "response": row["say"], "history": row["before"]})["input_ids"]
    cue = len(ids) - ids[::-1].index(tokenizer.control("<|assistant|>"))
    return ids[:cue]


def test_the_folder_alone_loads_and_answers(tuned, glm):
    """A6: the base model's folder is gone by now."""
    assert glm("verify", tuned).code == 0
    assert glm("chat", "--model", tuned, "--prompt", "你好", *GREEDY, "--verify").code == 0


def test_every_checkpoint_on_the_way_loads_and_answers_too(tuned, glm):
    """A6."""
    checkpoints = sorted(tuned.glob("checkpoint-*"))
    assert [folder.name for folder in checkpoints] == ["checkpoint-1", "checkpoint-2"]
    for folder in checkpoints:
        assert glm("chat", "--model", folder, "--prompt", "你好", *GREEDY, "--verify").code == 0


def test_the_prompt_format_is_kept_with_the_weights(tuned):
    """F8."""
    for folder in (tuned, tuned / "checkpoint-1"):
        stored = json.loads((folder / "prompt.json").read_text(encoding="utf-8"))
        assert stored == {"template": "chatglm3", "source_prefix": PREFIX}


def test_chat_asks_with_the_ids_of_training(tuned, asked, glm):
    """F8: the prefix too."""
    glm("chat", "--model", tuned, "--prompt", ROWS[1]["ask"], *GREEDY)
    assert asked.prompts == [learnt_prompt(ROWS[1], tuned)]


def test_evaluate_asks_with_the_columns_history_and_limits_of_training(tuned, asked, rows_file, tmp_path, glm):
    """F7: nothing but the file is named."""
    file = rows_file(*ROWS)
    done = glm(
        "evaluate", "--model", tuned, "--test-file", file, "--output-dir", tmp_path / "scores", "--device", "cpu"
    )
    assert done.code == 0
    assert sorted(asked.prompts) == sorted(learnt_prompt(row, tuned) for row in ROWS)
    assert asked.limit == 40
    columns = read_manifest(tuned)["provenance"]["columns"]
    assert columns == {"prompt": "ask", "response": "say", "history": "before"}


def test_evaluate_does_without_a_history_that_the_rows_lack(tuned, asked, rows_file, tmp_path, glm):
    row = {"ask": "类型#裙", "say": "好看的裙子。"}
    done = glm("evaluate", "--model", tuned, "--test-file", rows_file(row), "--output-dir", tmp_path / "scores")
    assert done.code == 0
    assert asked.prompts == [learnt_prompt(ROWS[1], tuned)]


def test_a_tuned_folder_is_tuned_on_with_its_own_prefix(tuned, train, tmp_path):
    done = train("--model-name-or-path", tuned)
    assert done.code == 0
    assert json.loads((tmp_path / "out" / "prompt.json").read_text(encoding="utf-8"))["source_prefix"] == PREFIX


def test_stdout_holds_the_folder_alone_and_the_weights_have_changed(train, toy_native, tmp_path):
    done = train("--learning-rate", 1e-2)
    assert (done.code, done.out) == (0, f"{tmp_path / 'out'}\n")
    before, after = (load_file(folder / "model.safetensors") for folder in (toy_native, tmp_path / "out"))
    assert set(before) == set(after)
    assert {name: tensor.dtype for name, tensor in before.items()} == {
        name: tensor.dtype for name, tensor in after.items()
    }
    assert not all(before[name].equal(after[name]) for name in before)


def test_with_json_logs_every_line_on_stderr_is_json(train):
    lines = [json.loads(line) for line in train("--log-format", "json", "--logging-steps", 1).err.splitlines()]
    assert any("loss" in line["message"] for line in lines)


def test_the_other_template_precision_and_memory_flags_make_a_folder_too(train, tmp_path):
    done = train(
        "--template", "round", "--bf16", "--gradient-checkpointing", "--gradient-accumulation-steps", 2,
        "--history-column", "before", "--max-train-samples", 1, "--lr-scheduler-type", "cosine", "--warmup-steps", 1,
    )  # fmt: skip
    assert done.code == 0
    assert open_native(tmp_path / "out", verify=True).prompt_format.template == "round"


@pytest.mark.parametrize("count", [35, 1])
def test_validation_rows_of_any_number_give_a_loss(count, train, rows_file):
    """F6."""
    done = train("--validation-file", rows_file(*[ROWS[1] | {"before": []}] * count, name="dev.jsonl"))
    assert done.code == 0
    assert "eval_loss" in done.err


@pytest.mark.parametrize("method", [("lora",), ("ptuning", "--pre-seq-len", 4)], ids=lambda words: words[0])
def test_validation_rows_give_a_loss_with_an_adapter_too(method, train, rows_file):
    """G13: the Trainer finds no labels in the signature of a model with a prefix."""
    done = train("--method", *method, "--validation-file", rows_file(ROWS[1], name="dev.jsonl"))
    assert done.code == 0
    assert "eval_loss" in done.err


def test_an_empty_validation_file_turns_validation_off_with_a_notice(train, tmp_path):
    """F6: 0 bytes."""
    (tmp_path / "dev.jsonl").write_bytes(b"")
    done = train("--validation-file", tmp_path / "dev.jsonl")
    assert done.code == 0
    assert f"{tmp_path / 'dev.jsonl'} is empty: no evaluation" in done.err
    assert "eval_loss" not in done.err


@pytest.mark.parametrize("words", [("--logging-steps", 1), ()], ids=["logged", "before the first log line"])
def test_a_loss_that_is_no_number_ends_the_run(words, train, tmp_path):
    """G4."""
    told = train("--learning-rate", 1e30, "--max-steps", 3, *words).mistake()
    assert "the loss was nan in 2 steps in a row, up to step 3" in told
    assert "lower --learning-rate" in told
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_test_rows_are_answered_and_scored_at_the_end(train, rows_file, tmp_path, glm):
    done = train(
        "--predict-with-generate", "--test-file", rows_file(*ROWS, name="test.jsonl"), "--max-target-length", 8
    )
    assert done.code == 0
    answers = (tmp_path / "out" / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prompt"] for line in answers] == [row["ask"] for row in ROWS]
    assert json.loads((tmp_path / "out" / "predict_results.json").read_text(encoding="utf-8"))["n"] == 2
    assert glm("verify", tmp_path / "out").code == 0


def test_conversations_with_a_tool_are_learnt_packed_and_answered_from_all_that_was_said(
    glm, toy_native, rows_file, asked, tmp_path
):
    """F7: the tool's schema, its call and what it observed are in front of the answer, as the API would put them."""
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


def test_rows_of_like_length_share_a_batch(toy_native, tmp_path, monkeypatch):
    """128 short and 128 long rows, shuffled by the sampler: at most one batch in eight mixes them."""

    class Started(Exception):
        pass

    def start(self, *_, **__):
        found.append(self)
        raise Started

    found = []
    monkeypatch.setattr(Trainer, "train", start)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"content": "裙" * (1 + 40 * (n % 2)), "summary": "好"}) + "\n" for n in range(256))
    )
    with pytest.raises(Started):
        trainer.train(TrainArguments(toy_native, rows, tmp_path / "out", per_device_train_batch_size=4))
    masks = [batch["attention_mask"] for batch in found[0].get_train_dataloader()]
    assert sum(len(mask) for mask in masks) == 256
    mixed = sum(len(set(mask.sum(1).tolist())) > 1 for mask in masks)
    assert mixed <= len(masks) / 8


def test_the_loss_falls_on_real_rows(golden, golden_native, tmp_path, glm):
    """The public ADGEN rows and the real vocabulary; 11.1 is the loss of even odds over 65024 ids."""
    words = ["--max-train-samples", 64, "--max-source-length", 32, "--max-target-length", 24]
    steps = ["--max-steps", 18, "--logging-steps", 6, "--learning-rate", 1e-2]
    assert glm("train", *flags(golden_native, golden / "adgen_dev.json", tmp_path / "out"), *words, *steps).code == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 3
    assert 11.5 > losses[0] > losses[1] > losses[2]
    assert losses[2] < 8


def test_the_proof_runs_on_the_device_of_the_training(glm, toy_native, rows_file, tmp_path, monkeypatch):
    """DEVICE counts, too: another device may have no room."""
    devices = []
    load = TransformersEngine.load

    def loading(*args, device="auto", **rest):
        devices.append(device)
        return load(*args, device=device, **rest)

    monkeypatch.setattr(TransformersEngine, "load", loading)
    monkeypatch.setenv("DEVICE", "cpu")
    words = flags(toy_native, rows_file({"content": "裙", "summary": "好"}), tmp_path / "out")[:-2]
    assert "--device" not in words
    assert glm("train", *words, "--max-steps", 1).code == 0
    assert devices == ["cpu"]
