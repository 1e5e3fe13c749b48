"""Preference tuning: its losses and gradients are those of TRL, and of the formula; rows of all shapes go in."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import GlmConfig, GlmForCausalLM

from entrypoints.__main__ import main
from entrypoints.dataset.columns import Columns
from entrypoints.training.loop.preference_trainer import PreferenceTrainer
from entrypoints.training.methods.loss import GlmForFineTuning
from entrypoints.training.rows.collation import PairCollator

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT
BETA, PROMPT = 0.25, 3
PAIRS = [  # prompt and chosen answer, prompt and rejected answer; the prompt has PROMPT ids
    ([5, 17, 9, 31, 44, 2], [5, 17, 9, 12, 2]),
    ([8, 3, 21, 40, 2], [8, 3, 21, 41, 42, 43, 2]),
    ([11, 12, 13, 14, 15, 16, 2], [11, 12, 13, 14, 2]),
]
# Computed by DPOTrainer of TRL 1.16.0 with the model of `policy`, beta 0.25 and the pairs above, in float32: the loss,
# and sum and norm of the gradient of each named parameter. The reference of the LoRA is the model without it.
TRL = {
    "lora": {
        "loss": 0.69618064,
        "gradients": {
            "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight": (0.00094992504, 0.014769166),
            "base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight": (0.0025219414, 0.020030494),
            "base_model.model.model.layers.1.mlp.down_proj.lora_A.default.weight": (0.27847511, 0.10031209),
            "base_model.model.model.layers.1.mlp.down_proj.lora_B.default.weight": (0.028128955, 0.066388618),
        },
    },
    "full": {
        "loss": 0.69425869,
        "gradients": {
            "model.layers.1.self_attn.q_proj.weight": (0.0011894615, 0.047085598),
            "model.layers.1.self_attn.q_proj.bias": (0.0011328768, 0.0095183764),
            "model.layers.1.self_attn.k_proj.weight": (-0.00050632373, 0.045875302),
            "model.layers.1.self_attn.k_proj.bias": (-0.00023453426, 0.001554981),
            "model.layers.1.self_attn.v_proj.weight": (-0.0037636967, 0.29274609),
            "model.layers.1.self_attn.v_proj.bias": (-0.035601123, 0.087530987),
            "model.layers.1.self_attn.o_proj.weight": (-0.0052146939, 0.34020658),
            "model.layers.1.mlp.gate_up_proj.weight": (-0.0045549723, 0.19964876),
            "model.layers.1.mlp.down_proj.weight": (0.29786108, 0.32904631),
            "model.layers.1.input_layernorm.weight": (0.0034183898, 0.027535342),
            "model.layers.1.post_attention_layernorm.weight": (0.02900229, 0.031209048),
            "lm_head.weight": (-5.7594406e-08, 0.73020519),
        },
    },
}


def fill(model, scale, phase):
    """Weights from a formula, so that they do not depend on a generator."""
    for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if "norm" not in name and (phase == 0 or parameter.requires_grad):
            steps = torch.arange(parameter.numel(), dtype=torch.float64)
            values = (scale * torch.sin(0.7 * steps + 1.3 * number + phase)).float().reshape(parameter.shape)
            parameter.data = values if phase == 0 or "lora_" in name else parameter.data + values


def as_tuned(model):
    model.__class__ = GlmForFineTuning
    model.replace_output_layer()


def policy(method):
    """A model that differs from its reference, and the reference where it is a model of its own."""
    config = GlmConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=[2], attention_bias=True,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model, reference = (GlmForCausalLM(config) for _ in range(2))
    for one in (model, reference):
        one.config.use_cache = False
        fill(one, 0.3, 0)
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
        fill(model, 0.2, 1)
        return model, None
    fill(model, 0.01, 1)
    return model, reference


def labels_of(ids):
    return [-100] * PROMPT + ids[PROMPT:]


def our_losses(method):
    model, reference = policy(method)
    as_tuned(model.base_model.model if method == "lora" else model)
    rows = [
        {"input_ids": one, "labels": labels_of(one), "rejected_ids": two, "rejected_labels": labels_of(two)}
        for one, two in PAIRS
    ]
    trainer = SimpleNamespace(
        arguments=SimpleNamespace(dpo_beta=BETA), accelerator=SimpleNamespace(unwrap_model=lambda model: model)
    )
    batch = PairCollator(0)(rows)
    if reference:
        as_tuned(reference)
        with torch.no_grad():
            batch["reference"] = -reference(**batch, row_sums=True).logits[:, 0]
    return model, PreferenceTrainer._losses(trainer, model, batch)


def found_gradients(model):
    return {
        name: (parameter.grad.double().sum().item(), parameter.grad.double().norm().item())
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and ("layers.1" in name or "lm_head" in name)
    }


@pytest.mark.parametrize("method", TRL)
def test_losses_and_gradients_are_those_of_trl(method):
    model, losses = our_losses(method)
    losses.mean().backward()
    assert losses.mean().item() == pytest.approx(TRL[method]["loss"], abs=1e-5)
    gradients = found_gradients(model)
    assert gradients.keys() == TRL[method]["gradients"].keys()
    assert len(gradients) >= 4
    for name, expected in TRL[method]["gradients"].items():
        assert gradients[name] == pytest.approx(expected, abs=1e-5), name


@pytest.mark.parametrize("method", TRL)
def test_losses_are_those_of_the_formula(method):
    """Row by row, without padding, from the probabilities of single tokens."""
    model, reference = policy(method)

    def log_probability(one, ids):
        scores = one(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(scores[place - 1, ids[place]].item() for place in range(PROMPT, len(ids)))

    def log_ratio(ids):
        if reference:
            return log_probability(model, ids) - log_probability(reference, ids)
        with model.disable_adapter():
            base = log_probability(model, ids)
        return log_probability(model, ids) - base

    expected = [math.log1p(math.exp(-BETA * (log_ratio(chosen) - log_ratio(rejected)))) for chosen, rejected in PAIRS]
    _, losses = our_losses(method)
    assert losses.tolist() == pytest.approx(expected, abs=1e-5)


ROWS = [
    {"instruction": "写广告", "input": "红色的裙子", "chosen": "红裙很美", "rejected": "不好看"},
    {
        "instruction": "再短些", "history": [["写广告", "红裙很美，很长"]], "system": "你是助手",
        "chosen": "美", "rejected": "丑",
    },
    {"instruction": "你好", "chosen": "你好呀", "rejected": "走开"},
    {"instruction": "推荐一种茶", "chosen": "可以试试龙井。", "rejected": "不知道"},
    {"instruction": "2+2", "chosen": "4", "rejected": "5"},
    {"instruction": "想一个店名", "chosen": "晨光书屋", "rejected": "店"},
]  # fmt: skip


@pytest.fixture
def preference_file(tmp_path):
    def write(*rows):
        file = tmp_path / "preferences.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return file

    return write


def losses_of(folder, name="loss"):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [event[name] for event in history if name in event]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "freeze", "lora"])
def test_a_run_starts_at_the_loss_of_equal_models_and_prefers_the_chosen_answer(
    method, tune, preference_file, tmp_path
):
    file = preference_file(*ROWS * 2)
    fields = {"method": method, "objective": "dpo", "learning_rate": 1e-3, "lora_dropout": 0.0, "max_steps": 12}
    output = tune(tmp_path / "out", train_file=file, validation_file=file, **fields)
    losses = losses_of(output)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses_of(output, "eval_loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses_of(output, "eval_loss")[-1] < 0.65


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_resumed_run_keeps_the_reference_of_its_start(method, tune, logged, preference_file, tmp_path):
    file = preference_file(*ROWS)
    fields = {"train_file": file, "method": method, "objective": "dpo", "learning_rate": 1e-3}
    whole = tune(tmp_path / "whole", **fields)
    resumed = tune(tmp_path / "out", resume=str(whole / "checkpoint-3"), **fields)
    assert [logged(resumed)[step] for step in (4, 5, 6)] == [logged(whole)[step] for step in (4, 5, 6)]


@pytest.mark.parametrize("flags", [["--dry-run"], ["--max-steps", "1"]], ids=str)
def test_the_command_estimates_and_trains_on_preferences(flags, toy_native, preference_file, tmp_path, capsys):
    file = preference_file(*ROWS)
    words = ["train", "--objective", "dpo", "--method", "lora", "--model-name-or-path", toy_native, "--device", "cpu"]
    words += ["--train-file", file, "--validation-file", file, "--output-dir", tmp_path / "out", *flags]
    assert main([str(word) for word in words]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists() == (flags != ["--dry-run"])
    capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "ptuning"], "--method ptuning does not work with --objective dpo"),
        (["--packing"], "--packing does not work with --objective dpo"),
        (
            ["--deepspeed", "zero2"],
            "--deepspeed does not work with --objective dpo and --method full: use --method lora",
        ),
        (["--format", "moss"], "--format moss does not work with --objective dpo"),
        (["--objective", "sft", "--rejected-column", "x"], "--rejected-column belongs to --objective dpo"),
        (["--rejected-column", "x"], "no column 'x' in preferences.jsonl"),
        (["--response-column", "x"], "no column 'x' in preferences.jsonl"),
        (["--system-column", "x"], "no column 'x' in preferences.jsonl"),
        (["--do-eval", "--validation-file", "FILE"], "--do-eval computes the loss of --objective dpo only beside a"),
        (["--dpo-beta", "0"], "--dpo-beta 0.0 is not above 0"),
        (["--objective", "sft", "--dpo-beta", "0.5"], "--dpo-beta belongs to --objective dpo"),
        (["--objective", "sft"], "the row has two answers, chosen and rejected; glm train --objective dpo learns from"),
    ],
    ids=str,
)
def test_flags_that_do_not_fit_are_rejected_at_once(flags, message, toy_native, preference_file, tmp_path, capsys):
    words = ["train", "--objective", "dpo", "--model-name-or-path", toy_native, "--output-dir", tmp_path / "out"]
    file = preference_file(ROWS[2])
    words += ["--train-file", file, *(file if flag == "FILE" else flag for flag in flags)]
    assert main([str(word) for word in words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_accumulated_pairs_give_the_losses_of_one_batch(tune, logged, preference_file, tmp_path):
    file = preference_file(*ROWS * 2)
    fields = {"train_file": file, "method": "lora", "objective": "dpo", "lora_dropout": 0.0, "learning_rate": 1e-3}
    fields |= {"max_steps": 3}
    whole = tune(tmp_path / "whole", per_device_train_batch_size=4, **fields)
    parts = tune(tmp_path / "parts", per_device_train_batch_size=1, gradient_accumulation_steps=4, **fields)
    assert logged(parts) == pytest.approx(logged(whole), rel=2e-5)


@pytest.mark.slow
def test_encoded_pairs_are_read_from_disk_and_a_second_run_finds_them(tune, preference_file, tmp_path, caplog):
    file, fields = preference_file(*ROWS), {"method": "lora", "objective": "dpo", "max_steps": 1}
    output = tune(tmp_path / "out", train_file=file, **fields)
    (arrow,) = output.glob(".rows/*/rows.arrow")
    pairs = Dataset.from_file(str(arrow))
    assert len(pairs) == len(ROWS)
    assert {"input_ids", "labels", "rejected_ids", "rejected_labels", "length"} <= set(pairs.column_names)
    lengths = [max(len(pair["input_ids"]), len(pair["rejected_ids"])) for pair in pairs]
    assert list(pairs["length"]) == lengths
    with caplog.at_level("INFO"):
        tune(output, train_file=file, overwrite_output_dir=True, **fields)
    assert f"{file}: using the cached encoded rows" in caplog.text


@pytest.mark.slow
def test_columns_with_other_names_give_the_same_run(tune, logged, preference_file, tmp_path):
    names = {"instruction": "q", "input": "more", "history": "past", "system": "role", "chosen": "good"}
    columns = Columns("q", "good", "past", input="more", system="role", rejected="rejected")
    fields = {"method": "lora", "objective": "dpo", "max_steps": 2}
    usual = tune(tmp_path / "usual", train_file=preference_file(*ROWS), **fields)
    named = [{names.get(name, name): value for name, value in row.items()} for row in ROWS]
    other = tune(tmp_path / "other", train_file=preference_file(*named), columns=columns, **fields)
    assert logged(other) == logged(usual)


def test_a_row_that_cannot_be_used_ends_the_run_before_the_model_is_looked_for(preference_file, tmp_path, capsys):
    file = preference_file(*ROWS, {**ROWS[2], "rejected": " "})
    words = ["train", "--objective", "dpo", "--model-name-or-path", tmp_path / "none", "--output-dir", tmp_path / "out"]
    assert main([str(word) for word in [*words, "--train-file", file]]) == 1
    message = f"{file}:7: empty rejected; 1 row cannot be used; fix them, or allow them with --max-skipped 1"
    assert message in capsys.readouterr().err
    assert main([str(word) for word in [*words, "--train-file", file, "--max-skipped", "1"]]) == 1
    assert "folder not found" in capsys.readouterr().err


@pytest.mark.slow
def test_qlora_starts_at_the_loss_of_equal_models_and_prefers_the_chosen_answer(tune, preference_file, tmp_path):
    """The reference is the quantized base model."""
    pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes (extra qlora)")
    file = preference_file(*ROWS * 2)
    fields = {"method": "qlora", "objective": "dpo", "learning_rate": 1e-3, "lora_dropout": 0.0, "max_steps": 12}
    losses = losses_of(tune(tmp_path / "out", train_file=file, validation_file=file, **fields), "eval_loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < 0.65
