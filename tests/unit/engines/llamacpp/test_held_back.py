"""Ids that a stream of llama.cpp does not name are found from the bytes before the last token's own."""

import pytest

from entrypoints.checkpoint import tiktoken_vocabulary
from entrypoints.checkpoint.tokenizer import Tokenizer, with_special_tokens
from entrypoints.engines.llamacpp.held_back import HeldBackTokens
from entrypoints.families import GLM4

SMILE = "😀".encode()  # f0 9f 98 80
TOKENS = [bytes([value]) for value in range(256)] + [SMILE[:2], SMILE[1:3], b" " + SMILE[:1], "你".encode()[:2], b"ab"]


@pytest.fixture(scope="module")
def held_back():
    backend = with_special_tokens(tiktoken_vocabulary.from_ranks(TOKENS, "test"), GLM4)
    return HeldBackTokens(Tokenizer(backend, GLM4))


@pytest.mark.parametrize(
    ("data", "last", "count", "ids"),
    [
        (b"ab", 260, 0, []),
        ("你".encode(), 0xA0, 1, [259]),  # one token of two bytes
        ("你".encode(), 0xA0, 2, [0xE4, 0xBD]),  # or two tokens of one byte: the number tells
        (SMILE, 0x80, 2, [256, 0x98]),
        (SMILE, 0x80, 3, [0xF0, 0x9F, 0x98]),
        (b" " + SMILE, 0x80, 2, [258, 257]),
        (b" " + SMILE, 0x80, 3, [258, 0x9F, 0x98]),
        ("你".encode(), 0xA0, None, [259]),  # the longest tokens, if the number is not known
        (b"", 262, 0, []),  # a special token has no bytes
    ],
)
def test_the_ids_before_the_last_follow_from_bytes_and_number(data, last, count, ids, held_back):
    assert held_back.before(data, last, count) == ids


@pytest.mark.parametrize(("data", "last"), [(SMILE, 0x80), ("你".encode() + b"ab", 260), (b"ab", 0x80)])
def test_bytes_that_no_tokens_explain_become_padding_of_the_known_number(data, last, held_back):
    pad_id = len(TOKENS)  # <|endoftext|>
    assert held_back.before(data, last, 1) == [pad_id]
    assert held_back.before(data, last, None) in ([], [256, 0x98])
