"""The attention of a training run: equal to transformers' with masks, padded and packed, on every path of a device."""

import inspect

import pytest
import torch
from torch.nn.attention import varlen

from entrypoints.chat_format.prompt import IGNORE_INDEX
from entrypoints.checkpoint.native import open_native
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.methods import attention, trainable_model
from entrypoints.training.rows.collation import Collator
from entrypoints.training.rows.packing import collate_packed

LENGTHS = (7, 12, 1, 20)


@pytest.fixture(scope="module")
def rows():
    """Rows of LENGTHS ids; a third of each is prompt."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in LENGTHS:
        ids = torch.randint(300, 2000, (length,), generator=generator).tolist()
        prompt = max(1, length // 3)  # the first token of a row has no label
        labels = [IGNORE_INDEX] * prompt + ids[prompt:]
        made.append({"input_ids": ids, "labels": labels, "length": length})
    return made


@pytest.fixture
def packed(rows):
    """The same rows as two packs in one batch."""
    packs = []
    for part in (rows[:2], rows[2:]):
        joined = {name: [id_ for row in part for id_ in row[name]] for name in ("input_ids", "labels")}
        lengths = [row["length"] for row in part]
        positions = [place for length in lengths for place in range(length)]
        packs.append({**joined, "position_ids": positions, "row_lengths": lengths, "length": sum(lengths)})
    return collate_packed(packs)


def gradients(model, batch):
    model.zero_grad()
    found = model(**batch, num_items_in_batch=torch.tensor(1)).loss
    found.backward()
    return found, {name: weight.grad.clone() for name, weight in model.named_parameters()}


def load(toy_native):
    arguments = TrainArguments(toy_native, toy_native / "rows", toy_native / "out")
    model = trainable_model.load(arguments, open_native(toy_native).model_config, torch.float32)
    assert model.config._attn_implementation == attention.TRAINING_ATTENTION
    return model


@pytest.fixture
def expected(toy_native, rows):
    """Loss and gradients of the padded batch with transformers' own masks."""
    model = load(toy_native)
    model.set_attn_implementation("sdpa")
    return gradients(model, Collator(0)(rows))


def test_padded_rows_without_a_mask_have_the_loss_and_gradients_of_masked_ones(toy_native, rows, expected):
    torch.testing.assert_close(gradients(load(toy_native), Collator(0)(rows)), expected)


def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(toy_native, packed, expected):
    assert packed["row_starts"].tolist() == [0, 7, 19, 20, 40]
    assert packed["row_starts"].dtype == torch.int32
    torch.testing.assert_close(gradients(load(toy_native), packed), expected)


def test_without_a_flash_kernel_repeated_heads_give_the_same(toy_native, packed, expected, monkeypatch):
    """As on V100 and T4, and in float32: a model of the device type "cuda" whose tensors are on the CPU."""
    monkeypatch.setattr(attention, "_causal", causal_as_on_cuda(attention._causal))
    torch.testing.assert_close(gradients(load(toy_native), packed), expected)


def causal_as_on_cuda(function):
    """The function with another device type in its own copy of the code, and without grouped heads in the library."""
    source = inspect.getsource(function).replace('query.device.type == "cpu" or ', "")
    assert source != inspect.getsource(function)
    names = dict(vars(attention))
    exec(compile(source, "attention.py", "exec"), names)
    return names["_causal"]


def test_the_flash_kernel_is_called_as_the_library_documents_it(toy_native, packed, expected, monkeypatch):
    """Replaced by its documented meaning, computed row by row; the real one runs on CUDA only."""
    documented, calls = inspect.signature(varlen.varlen_attn), []

    def computed(*args, **kwargs):
        given = documented.bind(*args, **kwargs)
        given.apply_defaults()
        calls.append(given.arguments)
        query, key, value, starts, of_keys, longest = list(given.arguments.values())[:6]
        assert torch.equal(starts, of_keys)
        assert longest == max(LENGTHS)
        assert (query.dim(), given.arguments["window_size"]) == (3, (-1, 0))  # causal, as its documentation says
        assert given.arguments["enable_gqa"]
        parts = []
        for start, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
            heads = query.shape[1] // key.shape[1]
            q, k, v = (states[start:end].transpose(0, 1) for states in (query, key, value))
            scores = q @ k.repeat_interleave(heads, 0).transpose(1, 2) * given.arguments["scale"]
            scores = scores.masked_fill(~torch.ones(end - start, end - start).tril().bool(), -torch.inf)
            parts.append((scores.softmax(-1) @ v.repeat_interleave(heads, 0)).transpose(0, 1))
        return torch.cat(parts)

    functions = inspect.Signature(documented.parameters.values())
    computed.__signature__ = functions
    monkeypatch.setattr(attention, "varlen_attn", computed)
    monkeypatch.setattr(attention, "has_flash_kernel", lambda states: True)
    torch.testing.assert_close(gradients(load(toy_native), packed), expected)
    assert len(calls) == open_native(toy_native).model_config.num_layers


@pytest.mark.parametrize(
    ("dtype", "capability", "flash"),
    [
        (torch.bfloat16, (8, 0), True), (torch.float16, (9, 0), True), (torch.float16, (7, 5), False),
        (torch.float32, (9, 0), False), (torch.float32, (7, 0), False),
    ],
)  # fmt: skip
def test_the_flash_kernel_is_used_in_16_bits_from_ampere_on(dtype, capability, flash, monkeypatch):
    class OnCuda:
        device = torch.device("cuda")

    states = OnCuda()
    states.dtype = dtype
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention.has_flash_kernel(states) is flash
    assert not attention.has_flash_kernel(torch.zeros(1, dtype=dtype))
