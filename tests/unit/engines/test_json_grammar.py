"""Schemas that are understood give JSON of the schema, from a model that would say anything; others are refused."""

import json

import pytest

from entrypoints.answer import read_answer
from entrypoints.engines.json_grammar import json_grammar
from entrypoints.errors import UserError
from entrypoints.sampling import Sampling

TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1}},
            "required": ["children"],
        }
    },
}


def is_tree(value):
    return set(value) == {"children"} and len(value["children"]) <= 1 and all(map(is_tree, value["children"]))


def optional(*names):
    return {"type": "object", "properties": {name: {"const": name} for name in names}}


CASES = {
    "any object": ({}, lambda value: isinstance(value, dict)),
    "nothing": ({"type": "object", "additionalProperties": False}, lambda value: value == {}),
    "texts by name": (
        {"type": "object", "additionalProperties": {"type": "boolean"}},
        lambda value: all(isinstance(one, bool) for one in value.values()),
    ),
    "all optional": (
        optional("a", "b", "c"),
        lambda value: list(value) == sorted(value) and all(k == v for k, v in value.items()),
    ),
    "last required": ({**optional("a", "b", "c"), "required": ["c"]}, lambda value: value["c"] == "c"),
    "a name with quotes": (
        {"type": "object", "properties": {'"\\\n裙': {"type": "null"}}, "required": ['"\\\n裙']},
        lambda value: value == {'"\\\n裙': None},
    ),
    "nested": (
        {"type": "object", "properties": {"x": optional("a"), "y": optional("b")}, "required": ["x", "y"]},
        lambda value: list(value) == ["x", "y"],
    ),
    "a list of two or three": (
        {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
        lambda value: 2 <= len(value) <= 3 and all(isinstance(one, int) for one in value),
    ),
    "an empty list": ({"type": "array", "maxItems": 0}, lambda value: value == []),
    "a short text": ({"type": "string", "minLength": 2, "maxLength": 4}, lambda value: 2 <= len(value) <= 4),
    "a number or nothing": (
        {"type": ["number", "null"], "description": "how many"},
        lambda value: value is None or isinstance(value, int | float),
    ),
    "a choice": ({"enum": ["裙", 1, None, [True]]}, lambda value: value in ("裙", 1, None, [True])),
    "one of two kinds": (
        {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}]},
        lambda value: isinstance(value, bool | str),
    ),
    "a tree": (TREE, is_tree),
}


@pytest.mark.parametrize("name", CASES)
def test_answers_are_of_the_schema(name, llama, prompts, toy_tokenizer):
    """The empty header that the model was taught may come first; reading takes it away."""
    schema, fits = CASES[name]
    whole = 0
    for seed in range(6):
        sampling = Sampling(max_new_tokens=300, temperature=1.0, top_p=1.0, json_schema=schema, seed=seed)
        ids = list(llama.generate(prompts[0], sampling))
        if len(ids) < 300:  # a list or a text may have no end
            whole += 1
            assert fits(json.loads(read_answer(ids, toy_tokenizer).content))
    assert whole >= 1


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "string", "pattern": "a+"}, "keyword 'pattern' beside type string"),
        ({"type": "integer", "minimum": 3}, "keyword 'minimum' beside type integer"),
        ({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}, "keyword 'uniqueItems'"),
        ({"type": "object", "not": {}}, "keyword 'not'"),
        ({"anyOf": [{"type": "null"}], "type": "object"}, "keyword 'type' beside anyOf"),
        ({"type": "text"}, r"type \[\"text\"\]"),
        ({"minimum": 3}, "keyword 'minimum'"),
        ({"type": "object", "properties": {"a": False}}, "false in the place of a schema"),
        ({"type": "object", "required": ["a"]}, "required 'a', which is no property"),
        ({"type": "string", "maxLength": 100000}, "maxLength 100000"),
        ({"type": "string", "minLength": "2"}, "minLength 2"),
        ({"enum": []}, "in the place of a list"),
        ({"$ref": "#/$defs/nothing"}, r"\$ref '#/\$defs/nothing'"),
        ({"$ref": "https://example.org/schema"}, r"\$ref 'https"),
        ({"type": "object", "properties": ["a"]}, "is malformed"),
        ({"type": 3}, "is malformed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_understood_is_refused_by_name(schema, words):
    with pytest.raises(UserError, match=words):
        json_grammar(schema)


def test_many_optional_properties_keep_the_grammar_small():
    """Each property is one rule: three levels of twelve would else be half a million copies."""
    schema = {"type": "string"}
    for _ in range(3):
        schema = {"type": "object", "properties": {f"p{number}": schema for number in range(12)}}
    assert len(json_grammar(schema)) < 1_000_000
