"""Supported schemas constrain an untrained model to matching JSON; unsupported ones are rejected."""

import json

import pytest
from jsonschema import Draft202012Validator

from entrypoints.chat_format.answer_parser import parse_answer
from entrypoints.chat_format.sampling import Sampling
from entrypoints.engines.grammar.json_schema import json_grammar
from entrypoints.errors import UserError

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
    "an empty object": ({"type": "object", "additionalProperties": False}, lambda value: value == {}),
    "a map": (
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
    "an integer with the bounds that JavaScript clients send": (
        {"type": "integer", "minimum": -(2**53) + 1, "maximum": 2**53 - 1},
        lambda value: isinstance(value, int) and abs(value) < 2**53,
    ),
    "an integer from zero": ({"type": "integer", "minimum": 0}, lambda value: isinstance(value, int) and value >= 0),
    "a positive integer": (
        {"type": "integer", "exclusiveMinimum": 0},
        lambda value: isinstance(value, int) and value > 0,
    ),
    "an empty list": ({"type": "array", "maxItems": 0}, lambda value: value == []),
    "a short string": ({"type": "string", "minLength": 2, "maxLength": 4}, lambda value: 2 <= len(value) <= 4),
    "a number or null": (
        {"type": ["number", "null"], "description": "how many"},
        lambda value: value is None or isinstance(value, int | float),
    ),
    "a choice": ({"enum": ["裙", 1, None, [True]]}, lambda value: value in ("裙", 1, None, [True])),
    "one of two types": (
        {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}]},
        lambda value: isinstance(value, bool | str),
    ),
    "a tree": (TREE, is_tree),
    "notes and neutral values": (
        {"type": "boolean", "discriminator": {"propertyName": "a"}, "x-order": 1, "example": 2, "uniqueItems": False},
        lambda value: isinstance(value, bool),
    ),
    "nullable": ({"type": "boolean", "nullable": True}, lambda value: value is None or isinstance(value, bool)),
}


@pytest.fixture(params=["llama", "batching_engine"])
def engine(request):
    """The untrained tiny model in llama.cpp and in transformers."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("name", CASES)
def test_answers_match_the_schema(name, engine, prompts):
    """The empty header line that ChatGLM3 writes may come first; the parser removes it."""
    schema, fits = CASES[name]
    length, seeds = (300, range(6)) if engine.name == "llamacpp" else (60, range(5))  # transformers is slower
    complete = 0
    for seed in seeds:
        sampling = Sampling(max_new_tokens=length, temperature=1.0, top_p=1.0, json_schema=schema, seed=seed)
        ids = list(engine.generate(prompts[0], sampling))
        if len(ids) < length:  # a list or a string may be unbounded
            complete += 1
            value = json.loads(parse_answer(ids, engine.tokenizer).content)
            assert fits(value)
            if name != "nullable":  # a keyword of OpenAPI
                Draft202012Validator(schema).validate(value)
    assert complete >= 1


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "pattern": "a+"}, "keyword 'pattern' beside type string"),
        ({"type": "integer", "minimum": 3}, "keyword 'minimum' beside type integer with the value 3"),
        ({"type": "integer", "minimum": 0, "maximum": 9}, "keyword 'maximum' beside type integer with the value 9"),
        ({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}, "keyword 'uniqueItems'"),
        ({"type": "object", "not": {}}, "keyword 'not'"),
        ({"anyOf": [{"type": "null"}], "type": "object"}, "keyword 'type' beside anyOf"),
        ({"type": "text"}, r"type \[\"text\"\]"),
        ({"minimum": 3}, "keyword 'minimum'"),
        ({"type": "object", "properties": {"a": False}}, "false instead of a schema"),
        ({"type": "object", "required": ["a"]}, "required 'a' that is not a property"),
        ({"type": "string", "maxLength": 100000}, "maxLength 100000"),
        ({"type": "string", "minLength": "2"}, "minLength 2"),
        ({"enum": []}, "instead of a list"),
        ({"$ref": "#/$defs/nothing"}, r"\$ref '#/\$defs/nothing'"),
        ({"$ref": "https://example.org/schema"}, r"\$ref 'https"),
        ({"type": "object", "properties": ["a"]}, "is malformed"),
        ({"type": 3}, "is malformed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_keywords_are_rejected_by_name(schema, message):
    with pytest.raises(UserError, match=message):
        json_grammar(schema)


def test_many_optional_properties_keep_the_grammar_small():
    """Each property is one rule; inlined, three levels of twelve would be half a million copies."""
    schema = {"type": "string"}
    for _ in range(3):
        schema = {"type": "object", "properties": {f"p{number}": schema for number in range(12)}}
    assert len(json_grammar(schema)) < 1_000_000
