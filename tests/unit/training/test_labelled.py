"""The loss: that of plain transformers, from fewer numbers; label smoothing and NEFTune in whole runs."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GlmForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

from entrypoints.checkpoint.native import open_native
from entrypoints.prompt import IGNORED
from entrypoints.training import methods
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.labelled import CrossEntropy


@pytest.fixture(scope="module")
def batch():
    """Three rows of 12 ids; the first 5, 2 and 9 have no label."""
    ids = torch.randint(300, 2000, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row, prompt in enumerate((5, 2, 9)):
        labels[row, :prompt] = IGNORED
    return {"input_ids": ids, "labels": labels}


@pytest.fixture
def learner(toy_native, tmp_path):
    """The toy as a method trains it, in float32 and without dropout."""

    def make(**fields):
        told = TrainArguments(toy_native, tmp_path / "rows", tmp_path / "out", lora_dropout=0.0, **fields)
        return methods.load(told, open_native(toy_native).shape, torch.float32)

    return make


def gradients(model, batch, **counted):
    model.zero_grad()
    loss = model(**batch, **counted).loss
    loss.backward()
    return loss, {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("counted", [{}, {"num_items_in_batch": torch.tensor(40)}], ids=["mean", "of a whole step"])
def test_loss_and_gradients_are_those_of_plain_transformers(counted, learner, toy_native, batch):
    plain = AutoModelForCausalLM.from_pretrained(toy_native, dtype=torch.float32)
    assert type(plain) is GlmForCausalLM
    expected, theirs = gradients(plain, batch, **counted)
    loss, ours = gradients(learner(), batch, **counted)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours, theirs)


def test_the_vocabulary_is_scored_in_front_of_labels_alone(learner, toy_native, batch):
    model, scored = learner(), []
    model.lm_head.register_forward_hook(lambda _module, _inputs, scores: scored.append(scores.shape))
    model(**batch)
    assert scored == [(7 + 10 + 3, open_native(toy_native).shape.vocabulary)]
    assert model(batch["input_ids"]).logits.shape[:2] == (3, 12)  # asked, not taught


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_scores_become_the_gradient_that_torchs_own_loss_gives_them(smoothing):
    """37 places: two whole parts and a piece of one; among the scores one that alone would overflow an exponential."""
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(37, 300, generator=generator), torch.randint(300, (37,), generator=generator)
    scores[3, 7] = 500.0
    plain = scores.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(plain, labels, reduction="sum", label_smoothing=smoothing)
    (expected / 5).backward()

    ours, memory = scores.clone().requires_grad_(), []
    told = ours * 1
    told.register_hook(lambda gradient: memory.append(gradient.data_ptr()))
    loss = CrossEntropy.apply(told, labels, smoothing)
    (loss / 5).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, plain.grad)
    assert memory == [told.data_ptr()]  # no second piece of that size


@pytest.mark.parametrize("fields", [{}, {"method": "lora"}, {"method": "ptuning", "pre_seq_len": 4}])
def test_smoothed_labels_give_the_trainers_smoothed_loss_to_every_method(fields, learner, batch):
    """The Trainer's own smoother takes a model whose name it does not know for one that shifts its labels."""
    model = learner(label_smoothing=0.1, **fields).train()
    torch.manual_seed(0)
    loss = model(**batch).loss
    torch.manual_seed(0)  # the dropout of a prefix
    logits = model(input_ids=batch["input_ids"]).logits
    torch.testing.assert_close(loss, LabelSmoother(0.1)({"logits": logits}, batch["labels"], shift_labels=True))
    plain = model.eval()(**batch).loss
    assert not torch.isclose(loss, plain, rtol=1e-4)  # held-out rows are judged by their own labels


@pytest.mark.parametrize("fields", [{"label_smoothing": 0.1}, {"neftune_noise_alpha": 5.0}])
def test_smoothing_and_noise_change_what_is_learnt_and_leave_a_plain_model(fields, tune, logged, tmp_path):
    plain, changed = (tune(tmp_path / name, max_steps=2, **given) for name, given in (("a", {}), ("b", fields)))
    assert all(logged(plain)[step] != logged(changed)[step] for step in (1, 2))
    assert open_native(changed).shape == open_native(plain).shape
