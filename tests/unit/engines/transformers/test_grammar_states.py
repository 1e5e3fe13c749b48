"""Positions in a grammar: compared with a recursive regular expression, which decides by another method."""

import random
import time

import pytest
from gbnf_regex import compile_grammar

from entrypoints.chat_format.tool_grammar import tool_call_grammar
from entrypoints.engines.grammar.json_schema import json_grammar
from entrypoints.engines.transformers.grammar_states import MAX_STATES, GrammarStates

GRAMMARS = {
    "any object": json_grammar({}),
    "optional properties": json_grammar(
        {"type": "object", "properties": {"a": {"type": "integer"}, "裙": {"type": "boolean"}, "b": {}}}
    ),
    "bounds": json_grammar(
        {"type": "array", "items": {"type": "string", "minLength": 2, "maxLength": 4}, "minItems": 1, "maxItems": 3}
    ),
    "alternatives": json_grammar({"anyOf": [{"enum": ["裙", "裙子", -1, None]}, {"type": ["number", "array"]}]}),
    "tool calls": tool_call_grammar({"f": {"properties": {"a": {}, "b": {"type": "integer"}}}, "g": None}),
}


@pytest.mark.parametrize("name", GRAMMARS)
def test_the_characters_that_can_come_next_are_those_of_the_regular_expression(name):
    """Walks at random through the answers; ends of the answer are compared too."""
    pattern, chance = compile_grammar(GRAMMARS[name]), random.Random(0)
    characters = [*map(chr, range(0x80)), "裙", "子", "é", "👋"]
    for _ in range(8):
        states = GrammarStates(GRAMMARS[name])
        state, text = states.start(), ""
        for _ in range(12):
            following = {one: states.advance(state, one.encode()) for one in characters}
            allowed = [one for one in characters if following[one] is not None]
            assert allowed == [one for one in characters if pattern.fullmatch(text + one, partial=True)], text
            assert state.accepts == (pattern.fullmatch(text) is not None), text
            if not allowed:
                break
            one = chance.choice(allowed)
            state, text = following[one], text + one


def test_bytes_of_a_character_come_one_by_one():
    states = GrammarStates(json_grammar({"type": "string"}))
    inside = states.advance(states.start(), b'"\xe8\xa3')
    assert states.advance(inside, b'\x99"').accepts
    for wrong in (b'"', b"\xff", b"\xc0"):
        assert states.advance(inside, wrong) is None
    for surrogate_or_too_long in (b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\xf8", b"\x80"):
        assert states.advance(states.start(), b'"' + surrogate_or_too_long) is None
    for code in (0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF):
        assert states.advance(states.start(), f'"{chr(code)}"'.encode()).accepts


def test_a_line_separator_in_a_value_is_not_the_end_of_a_rule():
    states = GrammarStates(json_grammar({"enum": ["a\u2028b", "c\u0085d"]}))
    assert states.advance(states.start(), '"a\u2028b"'.encode()).accepts
    assert states.advance(states.start(), '"c\u0085d"'.encode()).accepts


def test_a_long_answer_needs_bounded_memory_and_time_per_token():
    """Every level of a nested array is a new state."""
    states = GrammarStates(json_grammar({"type": "array"}))
    state, start = states.start(), time.process_time()
    for _ in range(3 * MAX_STATES):
        state = states.compact(states.advance(state, b"["))
    assert len(states._states) <= MAX_STATES
    for _ in range(3 * MAX_STATES):
        state = states.compact(states.advance(state, b"]"))
    assert state.accepts
    assert states.advance(state, b"]") is None
    assert time.process_time() - start < 10
