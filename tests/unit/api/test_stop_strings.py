import random

import pytest

from entrypoints.api.generation import StopStrings


def cut(parts, stops):
    """The released text of these parts, and whether a stop string was found."""
    stream, released = StopStrings(stops), ""
    for part in parts:
        released += stream.feed(part)
        if stream.found:
            return released, True
    return released + stream.finish(), False


def expected(text, stops):
    """Reference: the text before the stop string that is completed first, the longest if several end there."""
    for end in range(len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - max(map(len, done))], True
    return text, False


@pytest.mark.parametrize(
    ("parts", "stops", "released"),
    [
        (["ab", "cd"], ["bc"], "a"),
        (["你好", "。再", "见"], ["。再见"], "你好"),
        (["aab"], ["ab"], "a"),
        (["a", "a", "b"], ["ab"], "a"),
        (["ababac"], ["abac"], "ab"),
        (["ab", "ab", "ac"], ["abac"], "ab"),
        (["ab"], ["abc"], "ab"),
        (["x", "\n\n", "y"], ["\n\n"], "x"),
        (["abc"], ["abc", "b"], "a"),
        (["ab", "c"], ["abc", "b"], "a"),
        (["abc"], ["c", "abc"], ""),
        (["", "", "a"], ["a"], ""),
        (["abc"], [], "abc"),
    ],
)
def test_the_text_ends_before_the_stop_string(parts, stops, released):
    assert cut(parts, stops)[0] == released


def test_a_possible_stop_string_is_held_back():
    stream = StopStrings(["STOP"])
    assert [stream.feed(character) for character in "aSTxSTO"] == ["a", "", "", "STx", "", "", ""]
    assert stream.finish() == "STO"


def test_text_is_cut_alike_however_it_is_split():
    """10,000 random texts of few distinct characters, so that stop strings overlap themselves and each other."""
    chance = random.Random(3)
    found = 0
    for _ in range(10_000):
        text = "".join(chance.choices("ab你", k=chance.randrange(12)))
        stops = ["".join(chance.choices("ab你", k=chance.randrange(1, 5))) for _ in range(chance.randrange(4))]
        positions = sorted(chance.choices(range(len(text) + 1), k=chance.randrange(6)))
        parts = [text[a:b] for a, b in zip([0, *positions], [*positions, len(text)], strict=True)]
        assert cut(parts, stops) == expected(text, stops), (parts, stops)
        found += expected(text, stops)[1]
    assert 2_500 < found < 9_500
