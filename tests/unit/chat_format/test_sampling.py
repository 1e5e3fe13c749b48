"""Sampling parameters: defaults and bounds."""

import math

import pytest

from entrypoints.chat_format.sampling import Sampling
from entrypoints.errors import UserError


def test_the_defaults_are_those_of_chatglm3s_own_chat():
    """modeling_chatglm.py: chat(..., num_beams=1, do_sample=True, top_p=0.8, temperature=0.8)."""
    assert (Sampling().temperature, Sampling().top_p, Sampling().repetition_penalty) == (0.8, 0.8, 1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 1),
        ("temperature", 0),
        ("temperature", 2),
        ("top_p", 1e-9),
        ("top_p", 1),
        ("top_k", 1),
        ("repetition_penalty", 2),
        ("seed", 0),
        ("seed", -(2**63)),
        ("frequency_penalty", -2),
        ("presence_penalty", 2),
        ("top_logprobs", 0),
        ("top_logprobs", 20),
    ],
)
def test_the_bounds_themselves_are_valid(field, value):
    assert getattr(Sampling(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", 0),
        ("repetition_penalty", 0),
        ("repetition_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("presence_penalty", 2.1),
        ("top_logprobs", -1),
        ("top_logprobs", 21),
        ("seed", 2**63),
    ],
)
def test_a_value_out_of_bounds_is_rejected_with_its_name_and_value(field, value):
    with pytest.raises(UserError, match=f"{field}={value}"):
        Sampling(**{field: value})


def test_a_top_p_of_zero_is_greedy_decoding_and_engines_get_a_value_that_all_accept():
    """The engine vLLM rejects 0."""
    for temperature in (0, 0.8, 2):
        sampling = Sampling(temperature=temperature, top_p=0)
        assert sampling.greedy
        assert (sampling.temperature, sampling.top_p) == (0, 1)
    assert not Sampling(top_p=1e-9).greedy


def test_all_invalid_fields_are_reported_at_once():
    with pytest.raises(UserError) as caught:
        Sampling(temperature=3, top_p=-1, top_k=0)
    assert [name in str(caught.value) for name in ("temperature", "top_p", "top_k", "seed")] == [
        True,
        True,
        True,
        False,
    ]
