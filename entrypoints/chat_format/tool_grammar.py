"""A grammar (GBNF) of exactly the calls that a model may write, for `tool_choice` values that require a call.

A call has the form that the family was trained on and `tool_calls.ToolFormat.parse` reads. Its arguments have the names
and types of the tool's parameters: required ones first, then optional ones, each in the order of the schema.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from entrypoints.chat_format.tool_calls import is_keyword_name
from entrypoints.families import CHATGLM3, Family

MAX_DEPTH = 6  # deeper values may be any value: schemas can refer to themselves
PYTHON_RULES = r"""
string ::= "'" ([^'\\\x00-\x1f\x7f] | "\\" ['"\\nrt])* "'" | "\"" ([^"\\\x00-\x1f\x7f] | "\\" ['"\\nrt])* "\""
integer ::= "-"? ("0" | [1-9] [0-9]{0,15})
number ::= integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?
boolean ::= "True" | "False"
null ::= "None"
value ::= string | number | boolean | null | list | dict
list ::= "[" (value (", " value)*)? "]"
dict ::= "{" (string ": " value (", " string ": " value)*)? "}"
""".lstrip()
JSON_RULES = r"""
string ::= "\"" ([^"\\\x00-\x1f\x7f] | "\\" ["\\/bfnrt])* "\""
integer ::= "-"? ("0" | [1-9] [0-9]{0,15})
number ::= integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?
boolean ::= "true" | "false"
null ::= "null"
value ::= string | number | boolean | null | list | dict
list ::= "[" (value (", " value)*)? "]"
dict ::= "{" (string ": " value (", " string ": " value)*)? "}"
""".lstrip()
TYPES = {"string": "string", "integer": "integer", "number": "number", "boolean": "boolean", "null": "null"}


def tool_call_grammar(tools: Mapping[str, Mapping[str, Any] | None], family: Family = CHATGLM3) -> str:
    """The grammar of one call of one of these tools, given as the JSON schemas of their parameters by name."""
    is_json = family.tool_format == "json"
    calls = _Rules(_json_text if is_json else repr)
    for name, parameters in tools.items():
        schema = dict(parameters or {})
        calls.start_tool(schema)
        if is_json:
            calls.add("call", rf'"{name}\n" {calls.json_object(schema)}')
        else:
            calls.add("call", rf'"{name}\n" " "? "```python\ntool_call(" {calls.arguments(schema)}")\n```"')
    root = " | ".join(name for name in calls.rules if name.startswith("call-"))
    return f'root ::= " "? ({root})\n{JSON_RULES if is_json else PYTHON_RULES}' + "".join(
        f"{name} ::= {body}\n" for name, body in calls.rules.items()
    )


class _Rules:
    """The rules of one grammar; equal bodies share a rule."""

    def __init__(self, write: Callable[[Any], str]) -> None:
        self._write = write  # a value as the model writes it
        self.rules: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._root: dict[str, Any] = {}  # the schema of the tool
        self._references: dict[str, str] = {}  # rules of its definitions by their paths

    def start_tool(self, schema: dict[str, Any]) -> None:
        """Resolve references in this schema from now on."""
        self._root, self._references = schema, {}

    def add(self, prefix: str, body: str) -> str:
        """The name of a rule with this body."""
        if body not in self._names:
            self._names[body] = f"{prefix}-{len(self.rules)}"
            self.rules[self._names[body]] = body
        return self._names[body]

    def arguments(self, schema: dict[str, Any]) -> str:
        """Keyword arguments, or one mapping if a name cannot be a keyword."""
        properties = schema.get("properties")
        if not isinstance(properties, dict) or not properties:
            return '("**" dict)? ' if schema.get("additionalProperties") else ""
        if all(is_keyword_name(name) for name in properties):
            return self._pairs(schema, lambda name: f"{name}=", 0) + " "
        return f'"**{{" {self._pairs(schema, self._key, 0)} "}}" '

    def json_object(self, schema: dict[str, Any]) -> str:
        """All arguments as one JSON object."""
        properties = schema.get("properties")
        if not isinstance(properties, dict) or not properties:
            return "dict" if schema.get("additionalProperties") else '"{}"'
        return f'"{{" {self._pairs(schema, self._key, 0)} "}}"'

    def _key(self, name: str) -> str:
        return f"{self._write(name)}: "

    def _pairs(self, schema: dict[str, Any], write_name: Any, depth: int) -> str:
        required = schema.get("required")
        required = required if isinstance(required, list) else []
        always: list[str] = []
        optional: list[str] = []
        for name, one in schema["properties"].items():
            pair = self.add("pair", f"{_literal(write_name(name))} {self._value(one, depth + 1)}")
            (always if name in required else optional).append(pair)
        if always:
            more = "".join(f' (", " {pair})?' for pair in optional)
            return self.add("pairs", ' ", " '.join(always) + more)
        rest, starts = "", []
        for pair in reversed(optional):  # what follows each pair is a rule: copies would be quadratic
            starts.append(f"{pair} {rest}".strip())
            rest = self.add("rest", f'(", " {pair})? {rest}'.strip())
        return f"({self.add('pairs', ' | '.join(reversed(starts)))})?"

    def _value(self, schema: object, depth: int) -> str:
        if not isinstance(schema, dict) or depth > MAX_DEPTH:
            return "value"
        if isinstance(schema.get("$ref"), str):
            return self._referenced(schema["$ref"], depth)
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list) and values:
            return self.add("enum", " | ".join(_literal(self._write(value)) for value in values))
        for keyword in ("anyOf", "oneOf"):
            if isinstance(schema.get(keyword), list) and schema[keyword]:
                return self._union([self._value(one, depth + 1) for one in schema[keyword]])
        types = schema.get("type")
        if isinstance(types, list) and types:
            return self._union([self._value({**schema, "type": one}, depth + 1) for one in types])
        if types == "array":
            item = self._value(schema.get("items"), depth + 1)
            return self.add("list", f'"[" ({item} (", " {item})*)? "]"')
        if types == "object" and isinstance(schema.get("properties"), dict) and schema["properties"]:
            return self.add("dict", f'"{{" {self._pairs(schema, self._key, depth)} "}}"')
        return "dict" if types == "object" else TYPES.get(str(types), "value")

    def _referenced(self, path: str, depth: int) -> str:
        """The rule of a definition, as Pydantic writes it for an enum or a nested model; any value within itself."""
        if path not in self._references:
            self._references[path] = "value"  # while it is being resolved
            self._references[path] = self._value(_definition(self._root, path), depth + 1)
        return self._references[path]

    def _union(self, members: Sequence[str]) -> str:
        unique = list(dict.fromkeys(members))
        return unique[0] if len(unique) == 1 else self.add("union", " | ".join(unique))


def _definition(root: Any, path: str) -> object:
    """What a path such as `#/$defs/Color` refers to; None if there is nothing."""
    for step in path.removeprefix("#").strip("/").split("/"):
        name = step.replace("~1", "/").replace("~0", "~")
        root = root.get(name) if isinstance(root, dict) else None
    return root if path.startswith("#/") else None


def _json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _literal(text: str) -> str:
    """A text as a terminal symbol."""
    return json.dumps(text, ensure_ascii=False)
