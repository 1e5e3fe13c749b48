"""The grammar of required calls accepts what the parser reads. Two matchers decide, written independently."""

import json

import pytest
from gbnf_matcher import matches

from entrypoints.chat_format.tool_calls import parse_tool_call, write_tool_call
from entrypoints.chat_format.tool_grammar import tool_call_grammar
from entrypoints.engines.transformers.grammar_states import GrammarStates

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["摄氏", "f", None]},
        "detail": {"type": "boolean", "discriminator": {"propertyName": "x"}},
    },
    "required": ["days", "city"],
}  # fmt: skip
OPTIONAL = {"properties": {"a": {"type": "number"}, "b": {"type": ["string", "null"]}, "c": {"type": "array"}}}
NESTED = {
    "properties": {
        "from": {"type": "object", "properties": {"x-y": {"type": "array", "items": {"type": "integer"}}}},
        "any": {}, "ref": {"$ref": "#/$defs/a"}, "one": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
    },
    "required": ["from"],
}  # fmt: skip
TOOLS = {
    "get_weather": WEATHER,
    "options": OPTIONAL,
    "nested": NESTED,
    "clock": None,
    "free": {"additionalProperties": True},
}


def accepts(text):
    """Whether both matchers accept the text."""
    grammar = tool_call_grammar(TOOLS)
    states = GrammarStates(grammar)
    end = states.advance(states.start(), text.encode())
    found = {matches(grammar, text), end is not None and end.accepts}
    assert len(found) == 1, text
    return found.pop()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("get_weather", {"city": "北'京\"\n\\", "days": -3}),
        ("get_weather", {"city": "", "days": 0, "unit": None, "detail": True}),
        ("options", {}), ("options", {"a": 1.5e-7}),
        ("options", {"b": None, "c": [1, "x", {"k": [None]}]}), ("options", {"c": []}),
        ("nested", {"from": {"x-y": [1, 2]}, "any": {"k": "v"}, "ref": [True], "one": "x"}), ("nested", {"from": {}}),
        ("clock", {}), ("free", {}),
    ],
)  # fmt: skip
def test_calls_in_the_form_of_training_match(name, arguments):
    code = write_tool_call(arguments)
    for blank in ("", " "):
        assert accepts(f"{blank}{name}\n{blank}{code}")
    assert parse_tool_call(name, code).arguments == arguments


@pytest.mark.parametrize(
    "text",
    [
        "nobody\n```python\ntool_call()\n```", "你好", "clock", "clock\n```python\ntool_call()",
        "clock\n```python\ntool_call(a=1)\n```", "get_weather\n```python\ntool_call(city='x')\n```",
        "get_weather\n```python\ntool_call(city='x', days='3')\n```", "clock\n```python\ntool_call()\n```\n再见",
        "get_weather\n```python\ntool_call(city='x', days=1, unit='k')\n```",
        "options\n```python\ntool_call(b=None, a=1)\n```", "options\n```python\ntool_call(a=__import__('os'))\n```",
    ],
)  # fmt: skip
def test_nothing_else_matches(text):
    assert not accepts(text)


@pytest.mark.parametrize(
    "schema", [{"properties": {"a": {"enum": []}}}, {"properties": {"a": 5}, "required": 5}, {"properties": []}]
)
def test_a_malformed_schema_allows_any_value(schema):
    grammar = tool_call_grammar({"f": schema})
    names = schema["properties"] or ()
    assert matches(grammar, "f\n" + write_tool_call({name: [1] for name in names}))


def test_a_definition_is_resolved_as_pydantic_writes_enums_and_nested_models():
    schema = {
        "properties": {"color": {"$ref": "#/$defs/Color"}, "size": {"$ref": "#/$defs/Size"}},
        "required": ["color", "size"],
        "$defs": {
            "Color": {"enum": ["红", "蓝"], "type": "string"},
            "Size": {"type": "object", "properties": {"unit": {"$ref": "#/$defs/Color"}}, "required": ["unit"]},
        },
    }
    grammar = tool_call_grammar({"f": schema})
    for color, unit, valid in (("红", "蓝", True), ("绿", "蓝", False), ("红", "绿", False), (1, "蓝", False)):
        arguments = {"color": color, "size": {"unit": unit}}
        assert matches(grammar, "f\n" + write_tool_call(arguments)) == valid


def test_a_definition_that_refers_to_itself_allows_any_value_there():
    node = {"type": "object", "properties": {name: {"$ref": "#/$defs/Node"} for name in "abcdefgh"}}
    grammar = tool_call_grammar({"f": {"properties": {"root": {"$ref": "#/$defs/Node"}}, "$defs": {"Node": node}}})
    assert matches(grammar, "f\n" + write_tool_call({"root": {"a": {"a": 1}}}))
    assert len(grammar) < 3000


@pytest.mark.parametrize("path", ["#/$defs/absent", "#/properties/a/type/x", "other.json#/a", "#", ""])
def test_a_reference_that_leads_nowhere_allows_any_value(path):
    grammar = tool_call_grammar({"f": {"properties": {"a": {"$ref": path}}, "required": ["a"]}})
    assert matches(grammar, "f\n" + write_tool_call({"a": [1]}))


def test_a_schema_that_refers_to_itself_ends():
    tree = {"type": "object", "properties": {}}
    tree["properties"]["child"] = tree
    assert len(tool_call_grammar({"f": tree})) < 3000
    assert json  # the schema itself could not be sent as JSON
