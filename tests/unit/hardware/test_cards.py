"""--gpu-memory: a size or a card, as people write them."""

import pytest

from entrypoints.errors import UserError
from entrypoints.hardware.cards import CARDS, parse_card


@pytest.mark.parametrize(
    ("text", "name", "gigabytes"),
    [
        ("24", "", 24), ("24GB", "", 24), ("24 gb", "", 24), ("11.5", "", 11.5), ("80G", "", 80),
        ("L20", "L20", 48), ("rtx4090", "RTX 4090", 24), ("NVIDIA GeForce RTX 4090", "RTX 4090", 24),
        ("4090", "RTX 4090", 24), ("A100-80GB", "A100 80G", 80), ("a100 40g", "A100 40G", 40), ("Tesla T4", "T4", 16),
        ("V100-32G", "V100 32G", 32), ("A800", "A800 80G", 80), ("h100", "H100", 80),
    ],
)  # fmt: skip
def test_a_size_or_a_card_is_understood_in_the_usual_spellings(text, name, gigabytes):
    card = parse_card(text)
    assert (card.name, card.memory / 1e9) == (name, gigabytes)


def test_every_card_is_found_by_its_own_name():
    assert [parse_card(card.name) for card in CARDS] == [*CARDS]
    assert len(CARDS) == 18


@pytest.mark.parametrize("text", ["B52", "", "0", "-24", "nan", "2000", "24 cards", "inf"])
def test_anything_else_is_an_error_that_lists_the_cards(text):
    with pytest.raises(UserError, match=r"neither a known card nor a number of GB from 1 to 1024; .*24.*RTX 4090"):
        parse_card(text)


def test_a_name_that_several_cards_have_is_an_error_that_lists_them():
    with pytest.raises(UserError, match="A100 names several cards; name one of A100 40G, A100 80G"):
        parse_card("A100")


def test_only_cards_before_ampere_lack_bfloat16():
    assert {card.name for card in CARDS if not card.has_bf16} == {"T4", "V100 16G", "V100 32G"}
