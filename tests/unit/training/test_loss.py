"""The loss equals that of plain transformers with fewer logits; label smoothing and NEFTune in complete runs."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GlmForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

from entrypoints.chat_format.prompt import IGNORE_INDEX
from entrypoints.checkpoint.native import open_native
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.methods import loss, trainable_model


@pytest.fixture(scope="module")
def batch():
    """Three rows of 12 ids; the first 5, 2 and 9 have no label."""
    ids = torch.randint(300, 2000, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row, prompt in enumerate((5, 2, 9)):
        labels[row, :prompt] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels}


@pytest.fixture
def learner(toy_native, tmp_path):
    """The tiny model as a method trains it, in float32 and without dropout."""

    def make(**fields):
        arguments = TrainArguments(toy_native, tmp_path / "rows", tmp_path / "out", lora_dropout=0.0, **fields)
        return trainable_model.load(arguments, open_native(toy_native).model_config, torch.float32)

    return make


def gradients(model, batch, **counted):
    model.zero_grad()
    found = model(**batch, **counted).loss
    found.backward()
    return found, {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("counted", [{}, {"num_items_in_batch": torch.tensor(40)}], ids=["mean", "of a whole step"])
def test_loss_and_gradients_are_those_of_plain_transformers(counted, learner, toy_native, batch):
    plain = AutoModelForCausalLM.from_pretrained(toy_native, dtype=torch.float32)
    assert type(plain) is GlmForCausalLM
    expected, theirs = gradients(plain, batch, **counted)
    found, ours = gradients(learner(), batch, **counted)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours, theirs)


def test_logits_are_computed_only_before_labels_and_never_all_at_once(learner, toy_native, batch, monkeypatch):
    model, products = learner(), []
    monkeypatch.setattr(loss, "LOSS_POSITIONS", 8)
    compute = loss._loss_and_gradient

    def note(logits, *rest):
        products.append(tuple(logits.shape))
        return compute(logits, *rest)

    monkeypatch.setattr(loss, "_loss_and_gradient", note)
    model(**batch).loss.backward()
    vocabulary = open_native(toy_native).model_config.vocab_size
    assert products == [(8, vocabulary), (8, vocabulary), (4, vocabulary)]  # 7 + 10 + 3 labels
    assert model(batch["input_ids"]).logits.shape[:2] == (3, 12)  # inference


@pytest.fixture(params=["of a CPU's cache", "of a GPU"])
def rows_at_once(request, monkeypatch):
    """A GPU computes all positions of a chunk in one kernel; a CPU computes the same with fewer rows at once."""
    if request.param == "of a GPU":
        monkeypatch.setattr(loss, "CPU_ROWS", loss.LOSS_POSITIONS)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.usefixtures("rows_at_once")
def test_loss_and_gradients_are_those_of_torchs_own_layer_and_loss(smoothing, monkeypatch):
    """37 positions: four full chunks and a part of one; one of the logits alone would overflow an exponential."""
    monkeypatch.setattr(loss, "LOSS_POSITIONS", 9)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(37, 8, generator=generator), torch.randn(300, 8, generator=generator)
    labels = torch.randint(300, (37,), generator=generator)
    hidden[3], weight[7] = 8.0, 8.0  # a logit of 512

    def gradients(function):
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        found = function(*inputs)
        (found / 5).backward()
        return found, *(tensor.grad for tensor in inputs)

    def of_torch(hidden, weight):
        return torch.nn.functional.cross_entropy(
            torch.nn.functional.linear(hidden, weight), labels, reduction="sum", label_smoothing=smoothing
        )

    ours = gradients(lambda hidden, weight: loss.linear_cross_entropy(hidden, weight, labels, smoothing))
    torch.testing.assert_close(ours, gradients(of_torch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("rows_at_once")
def test_in_16_bits_the_gradients_are_as_near_to_float64_as_those_of_torch(dtype):
    """A vocabulary of ChatGLM3's size: most probabilities are far below what float16 resolves. Weights in float32."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(24, 16, generator=generator), torch.randn(65024, 16, generator=generator)
    labels = torch.randint(65024, (24,), generator=generator)

    def gradients(function, precision):
        inputs = [tensor.to(precision).requires_grad_() for tensor in (hidden, weight)]
        with torch.autocast("cpu", dtype, enabled=precision == torch.float32):
            found = function(*inputs)
        (found / 24 * 2.0**12).backward()  # as with the loss scale of float16
        return [found, *(tensor.grad / 2.0**12 for tensor in inputs)]

    def of_torch(hidden, weight):
        logits = torch.nn.functional.linear(hidden, weight)
        return torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum")

    exact = gradients(of_torch, torch.float64)
    ours = gradients(lambda hidden, weight: loss.linear_cross_entropy(hidden, weight, labels), torch.float32)
    theirs = gradients(of_torch, torch.float32)
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert mine.isfinite().all()
        assert mine.dtype == torch.float32
        distance, limit = ((found.double() - right).norm() / right.norm() for found in (mine, other))
        assert distance <= max(2 * limit, 1e-5), (distance, limit)


def test_no_gradient_is_computed_for_frozen_weights_or_without_a_backward_pass(monkeypatch):
    hidden, weight, labels = torch.randn(5, 8), torch.randn(300, 8), torch.arange(5)
    found = loss.linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    found.backward()
    assert hidden.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        torch.testing.assert_close(loss.linear_cross_entropy(hidden, weight, labels), found.detach())


def test_a_batch_without_labels_has_a_loss_of_zero_that_can_be_differentiated(learner, batch):
    """Rows of one process may all be truncated to prompts; the others still average their gradients with it."""
    model = learner()
    empty = {**batch, "labels": torch.full_like(batch["labels"], IGNORE_INDEX)}
    found = model(**empty, num_items_in_batch=torch.tensor(40)).loss
    found.backward()
    assert found == 0
    assert all(not parameter.grad.any() for parameter in model.parameters())
    assert model(**empty, row_sums=True).logits.tolist() == [[0, 0]] * 3


@pytest.mark.parametrize("fields", [{}, {"method": "lora"}, {"method": "ptuning", "pre_seq_len": 4}])
def test_label_smoothing_gives_every_method_the_smoothed_loss_of_the_trainer(fields, learner, batch):
    """The Trainer's own smoother expects shifted labels from a model class that it does not know."""
    model = learner(label_smoothing=0.1, **fields).train()
    torch.manual_seed(0)
    found = model(**batch).loss
    torch.manual_seed(0)  # the dropout of a prefix
    logits = model(input_ids=batch["input_ids"]).logits
    torch.testing.assert_close(found, LabelSmoother(0.1)({"logits": logits}, batch["labels"], shift_labels=True))
    plain = model.eval()(**batch).loss
    assert not torch.isclose(found, plain, rtol=1e-4)  # validation uses unsmoothed labels


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"label_smoothing": 0.1}, {"neftune_noise_alpha": 5.0}])
def test_smoothing_and_noise_change_the_loss_and_leave_a_plain_model(fields, tune, logged, tmp_path):
    plain, changed = (tune(tmp_path / name, max_steps=2, **given) for name, given in (("a", {}), ("b", fields)))
    assert all(logged(plain)[step] != logged(changed)[step] for step in (1, 2))
    assert open_native(changed).model_config == open_native(plain).model_config
