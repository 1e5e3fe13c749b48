"""The grammar of a hostile schema stays small, and nested unions do not multiply the parses that llama.cpp follows."""

import json
import time

import pytest
from gbnf_matcher import matches

from entrypoints.chat_format.sampling import Sampling
from entrypoints.engines.base import JsonSchemaError
from entrypoints.engines.grammar.json_schema import json_grammar


def nested(levels, wrap):
    schema = {"type": "null"}
    for _ in range(levels):
        schema = wrap(schema)
    return schema


def references(levels, define):
    """A schema whose definition `xN` refers to `x(N-1)` several times, without nesting in the request."""
    definitions = {"x0": {"type": "null"}}
    for level in range(levels):
        definitions[f"x{level + 1}"] = define({"$ref": f"#/$defs/x{level}"})
    return {"$ref": f"#/$defs/x{levels}", "$defs": definitions}


SMALL = {
    "arrays": nested(300, lambda inner: {"type": "array", "items": inner}),
    "maps": nested(300, lambda inner: {"type": "object", "additionalProperties": inner}),
    "lists of types": nested(
        11, lambda inner: {"type": ["array", "object", "array"], "items": inner, "additionalProperties": inner}
    ),
    "properties": nested(7, lambda inner: {"type": "object", "properties": {"a": inner, "b": inner, "c": inner}}),
    "references": references(300, lambda inner: {"type": "object", "properties": {"a": inner, "b": inner}}),
    "unions of unions": references(200, lambda inner: {"anyOf": [inner, {"anyOf": [inner, {"type": "string"}]}]}),
}
LARGE = {
    "rules": {"type": "object", "properties": {f"p{i}": {"const": i} for i in range(5000)}, "required": ["p0"]},
    "characters": {"const": "x" * 500_000},
    "repetitions": {"anyOf": [{"type": "string", "maxLength": 2000 - i} for i in range(12)]},
    "alternatives": {"enum": list(range(1001))},
}
AMBIGUOUS = {
    "arrays": references(60, lambda x: {"anyOf": [{"type": "array", "items": x, "maxItems": n} for n in (1, 2)]}),
    "objects": references(
        60, lambda x: {"anyOf": [{"type": "object", "properties": {"a": x, name: {}}} for name in "bc"]}
    ),
    "recursion": {
        "anyOf": [{"type": "array", "items": {"$ref": "#"}, "minItems": 1, "maxItems": n} for n in (1, 2)]
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_a_subschema_that_is_used_often_becomes_one_rule(name):
    start = time.process_time()
    assert len(json_grammar(SMALL[name])) < 200_000
    assert time.process_time() - start < 2


@pytest.mark.parametrize("unit", LARGE)
def test_a_schema_with_a_large_grammar_is_rejected_with_the_limit(unit):
    start = time.process_time()
    with pytest.raises(JsonSchemaError, match=f"has more than [0-9]+ {unit}"):
        json_grammar(LARGE[unit])
    assert time.process_time() - start < 2


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_alternatives_that_multiply_the_parses_at_each_level_are_rejected(name):
    """Sixteen such levels kept llama.cpp busy for two minutes."""
    with pytest.raises(JsonSchemaError, match="is ambiguous"):
        json_grammar(AMBIGUOUS[name])


def test_recursive_alternatives_that_differ_at_their_beginning_are_accepted():
    def node(kind, **properties):
        kinds = {"name": {"type": "string"}, "kind": {"const": kind}}
        return {"type": "object", "properties": kinds | properties, "required": ["name", "kind", *properties]}

    either = {"$ref": "#/$defs/node"}
    schema = {
        **either,
        "$defs": {"node": {"anyOf": [node("leaf"), node("not", a=either), node("or", a=either, b=either)]}},
    }
    leaf = {"name": "x", "kind": "leaf"}
    grammar = json_grammar(schema)
    assert matches(grammar, json.dumps({"name": "y", "kind": "or", "a": leaf, "b": leaf}))
    assert not matches(grammar, json.dumps({"name": "y", "kind": "not", "a": leaf, "b": leaf}))


def test_a_reference_to_itself_alone_is_rejected():
    with pytest.raises(JsonSchemaError, match="refers to itself"):
        json_grammar({"anyOf": [{"$ref": "#"}, {"type": "null"}]})


@pytest.mark.parametrize(
    ("schema", "texts", "others"),
    [
        ({"type": "array", "items": {"type": "array"}}, ("[]", "[[], [1]]"), ("[1]", "[[],]")),
        (
            {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "required": ["b"]},
            ('{"b": 1}', '{"a": 1, "b": 2}', '{"a":1,"b":2,"c":{}}', '{"b": 1, "c": 2}'),
            ("{}", '{"a": 1}', '{"b": 1, "a": 2}', '{"b": 1,}', '{, "b": 1}'),
        ),
        (
            {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}},
            ("{}", '{"a": 1}', '{"a": 1, "c": 1}', '{"b": 1, "c": 1}', '{"c": 1}'),
            ('{"c": 1, "a": 1}', '{"d": 1}'),
        ),
        (
            {"type": ["object", "null"], "additionalProperties": {"type": "null"}},
            ("null", '{"x": null}'),
            ("[]", '{"x": 1}'),
        ),
        ({"anyOf": [{"enum": [1, "a"]}, {"type": ["boolean"]}]}, ("1", '"a"', "true"), ("2", "null")),
        (
            {"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 2},
            ("[null]", "[null,null]"),
            ("[]", "[null,null,null]"),
        ),
    ],
)  # fmt: skip
def test_the_grammar_matches_exactly_the_json_of_the_schema(schema, texts, others):
    grammar = json_grammar(schema)
    assert [text for text in texts if not matches(grammar, text)] == []
    assert [text for text in others if matches(grammar, text)] == []


@pytest.mark.parametrize("name", ["arrays", "lists of types", "unions of unions"])
def test_llama_cpp_loads_the_grammar_at_once(name, llama, prompts):
    start = time.monotonic()
    next(llama.generate(prompts[0], Sampling(max_new_tokens=1, json_schema=SMALL[name])))
    assert time.monotonic() - start < 5
