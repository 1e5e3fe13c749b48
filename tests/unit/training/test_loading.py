"""Where the weights of a run are read to, and what a step does with 16-bit inputs and losses."""

import pytest
import torch

from entrypoints.checkpoint.native import open_native
from entrypoints.errors import UserError
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.loop.callbacks import InvalidStepCounter, LossReader
from entrypoints.training.methods import trainable_model


def load(base, dtype, device=None, **fields):
    arguments = TrainArguments(base, base / "rows", base / "out", **fields)
    return trainable_model.load(arguments, open_native(base).model_config, dtype, False, device)


@pytest.mark.parametrize("fields", [{}, {"method": "freeze"}, {"method": "lora"}, {"method": "ptuning"}])
def test_every_tensor_of_a_run_is_loaded_to_the_device_of_its_process(fields, toy_native):
    """The device meta in place of a GPU: a model that was read into host memory first would stay there."""
    model = load(toy_native, torch.bfloat16, torch.device("meta"), **fields)
    assert {tensor.device.type for tensor in model.parameters()} == {"meta"}
    assert model.get_input_embeddings().weight.device.type == "meta"
    assert {tensor.device.type for tensor in load(toy_native, torch.bfloat16, **fields).parameters()} == {"cpu"}


def test_a_lora_reads_16_bit_inputs_as_they_are(toy_native):
    """PEFT would copy each input to float32, and autocast the copy back: the same loss and gradients, more memory."""
    ids = torch.randint(300, 2000, (2, 16), generator=torch.Generator().manual_seed(0))

    def gradients(cast):
        torch.manual_seed(0)
        model = load(toy_native, torch.bfloat16, method="lora", lora_dropout=0.0, lora_target="all-linear")
        layers = [module for module in model.modules() if hasattr(module, "cast_input_dtype_enabled")]
        assert len(layers) == 6 * 4
        assert not any(layer.cast_input_dtype_enabled for layer in layers)
        for layer in layers:
            layer.cast_input_dtype_enabled = cast
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss, {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}

    torch.testing.assert_close(gradients(cast=False), gradients(cast=True), rtol=0, atol=0)


@pytest.mark.slow
def test_a_lora_in_bfloat16_trains_and_saves(tune, logged, tmp_path):
    output = tune(tmp_path / "out", method="lora", bf16=True, max_steps=4, learning_rate=1e-2)
    losses = logged(output)
    assert losses[4] < losses[1]


class OnDevice(torch.Tensor):
    """A loss that says it is on CUDA."""

    is_cuda = True


def test_a_loss_of_a_gpu_is_read_one_step_later_and_the_last_one_at_the_end(monkeypatch):
    events = []

    class Event:
        def record(self):
            events.append("record")

        def synchronize(self):
            events.append("wait")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(OnDevice, "to", lambda self, *args, **kwargs: self.as_subclass(torch.Tensor), raising=False)
    counter = InvalidStepCounter(3)
    reader = LossReader(counter)
    seen = []
    for step, value in enumerate((2.0, 1.0, float("nan")), 1):
        reader.add(torch.tensor(value).as_subclass(OnDevice), False, step)
        seen.append(counter.last_step)
    assert seen == [0, 1, 2]
    assert events == ["record", "record", "wait", "record", "wait"]
    with pytest.raises(UserError, match="the loss was nan"):
        reader.check_last()
    on_cpu = LossReader(InvalidStepCounter(3))
    on_cpu.add(torch.tensor(1.5), False, 1)
    assert on_cpu.counter.last_loss == 1.5
