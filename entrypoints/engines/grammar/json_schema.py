"""Translates a JSON schema to a GBNF grammar that constrains the answers of llama.cpp and transformers.

llama.cpp's own translation cannot be used. This build passes a schema to llguidance, which ignores the leading space of
a token, stops at the first forced byte and leaves the rest of the answer unconstrained. For an unsupported schema it
only logs a line and leaves the whole answer unconstrained. This translation raises an error instead.
Limits: properties are generated in the order of the schema; if any are listed, no others are generated.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from entrypoints.chat_format.sampling import Sampling
from entrypoints.engines.base import JsonSchemaError
from entrypoints.engines.grammar.ambiguity import Beginning, Structure, check_ambiguity
from entrypoints.engines.grammar.rules import MAX_ALTERNATIVES, MAX_UNION_STEPS, Grammar, check_limit

# All keywords of JSON Schema that constrain a value; any other keyword is a note (`title`, `discriminator`, `x-order`).
CONSTRAINTS = {
    "$dynamicRef", "$recursiveRef", "$ref", "additionalItems", "additionalProperties", "allOf", "anyOf", "const",
    "contains", "dependencies", "dependentRequired", "dependentSchemas", "else", "enum", "exclusiveMaximum",
    "exclusiveMinimum", "format", "if", "items", "maxContains", "maxItems", "maxLength", "maxProperties", "maximum",
    "minContains", "minItems", "minLength", "minProperties", "minimum", "multipleOf", "not", "nullable", "oneOf",
    "pattern", "patternProperties", "prefixItems", "properties", "propertyNames", "required", "then", "type",
    "unevaluatedItems", "unevaluatedProperties", "uniqueItems",
}  # fmt: skip
NEUTRAL_VALUES = {"minProperties": 0, "nullable": False, "uniqueItems": False}  # with these they constrain nothing
KEYWORDS_BY_TYPE = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": {"minLength", "maxLength"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
}
TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
SCALARS = {"string", "integer", "number", "boolean", "null", "enum"}  # rules that contain no other value
MAX_REPETITIONS = 2000  # limit of llama.cpp
MAX_INTEGER = 10**15 - 1  # within the range of exact integers in JavaScript, which its clients send as bounds


def answer_grammar(sampling: Sampling) -> str | None:
    """The grammar that an answer must match, if any; raises JsonSchemaError for a schema that is not supported."""
    return sampling.grammar if sampling.json_schema is None else json_grammar(sampling.json_schema)


def json_grammar(schema: dict[str, Any]) -> str:
    """The grammar of JSON values that match the schema; `{}` matches any object.

    Raises JsonSchemaError naming the first keyword or value that is not supported, or the limit that is exceeded.
    """
    translator = _Translator(schema)
    try:
        translator.translate()
    except (AttributeError, TypeError, RecursionError) as error:
        raise JsonSchemaError(f"the JSON schema is malformed ({error})", "correct the schema") from error
    return translator.grammar.text()


class _Translator:
    """Translates each distinct subschema to one rule, which every use of the subschema shares.

    A union (anyOf, a list of types, a reference to either) is flattened to its member rules, each of which starts with
    a terminal. Nested unions therefore cost llama.cpp no more than one union.
    """

    def __init__(self, schema: dict[str, Any]) -> None:
        self.grammar = Grammar()
        self._schema = schema
        self._names: dict[Any, str] = {}  # rule name by type and keywords, or by the members of a union
        self._members_by_reference: dict[str, list[str] | None] = {}  # None: being resolved
        self._undefined: list[tuple[str, str, dict[str, Any]]] = []  # rules without a body: name, type, keywords
        self._structures: dict[str, Structure] = {}  # of object and array rules
        self._enums: dict[str, list[str]] = {}  # JSON literals by rule
        self._alternatives = 0
        self._union_steps = 0

    def translate(self) -> None:
        """Define the rule `answer` and all that it refers to; raises JsonSchemaError for an unsupported schema."""
        self.grammar.define("answer", self._rule(self._members(self._schema)) if self._schema else "object")
        while self._undefined:
            name, kind, keywords = self._undefined.pop()
            if kind == "string":
                body = self._string(keywords)
            elif kind == "enum":
                body = self._enum(keywords["enum"])
            elif kind == "integer":
                body = _integer(keywords)
            else:
                self._structures[name] = Structure(kind == "object")
                translate = self._object if kind == "object" else self._array
                body = translate(keywords, self._structures[name])
            self.grammar.define(name, body)
        check_ambiguity(self._structures)

    def _nested(self, schema: object, structure: Structure) -> str:
        """The rule of a value inside an object or array."""
        structure.values.append(self._members(schema))
        return self._rule(structure.values[-1])

    def _rule(self, members: Sequence[str]) -> str:
        """The rule of a union."""
        if len(members) == 1:
            return members[0]
        key = tuple(members)
        if key not in self._names:
            self._count_alternatives(len(members))
            self._names[key] = self.grammar.define(self.grammar.reserve("union"), " | ".join(members))
        return self._names[key]

    def _members(self, schema: object) -> list[str]:
        """The rules whose union matches the schema."""
        if schema is True or schema == {}:
            return ["value"]
        if not isinstance(schema, dict):
            raise _unsupported(f"{json.dumps(schema)[:60]} instead of a schema")
        keywords = {
            name: value
            for name, value in schema.items()
            if name in CONSTRAINTS and not (name in NEUTRAL_VALUES and value == NEUTRAL_VALUES[name])
        }
        if keywords.pop("nullable", None) is True:
            return list(dict.fromkeys([*self._members({**keywords, "nullable": False}), "null"]))
        if not keywords:
            return ["value"]
        translators: dict[str, Callable[[Any], list[str]]] = {
            "$ref": self._referenced_members,
            "const": lambda value: [self._named("enum", {"enum": [value]})],
            "enum": lambda values: [self._named("enum", {"enum": _choices(values)})],
            "anyOf": self._union_members,
            "oneOf": self._union_members,
        }
        keyword = next((name for name in translators if name in keywords), None)
        if keyword is None:
            return self._typed_members(keywords)
        value = keywords.pop(keyword)
        if keyword in ("const", "enum"):
            keywords.pop("type", None)  # the values imply it
        _check_keywords(keywords, set(), keyword)
        return translators[keyword](value)

    def _union_members(self, schemas: list[Any]) -> list[str]:
        members: dict[str, None] = {}  # a set that keeps the order
        for schema in _choices(schemas):
            found = self._members(schema)
            self._union_steps += len(found)
            check_limit("members of nested unions", self._union_steps, MAX_UNION_STEPS)
            members.update(dict.fromkeys(found))
        return list(members)

    def _count_alternatives(self, count: int) -> None:
        self._alternatives += count
        check_limit("alternatives", self._alternatives, MAX_ALTERNATIVES)

    def _typed_members(self, keywords: dict[str, Any]) -> list[str]:
        """The rules of a schema with "type", or with keywords that imply one."""
        types = keywords.pop("type", None)
        types = types or [name for name, names in KEYWORDS_BY_TYPE.items() if names & set(keywords)]
        types = [types] if isinstance(types, str) else types
        if not types or any(name not in TYPES for name in types):
            raise _unsupported(f"type {json.dumps(types)}" if types else f"keyword {sorted(keywords)[0]!r}")
        allowed = {keyword for name in types for keyword in KEYWORDS_BY_TYPE.get(name, ())}
        _check_keywords(keywords, allowed, f"type {types[0]}")
        return [self._named(name, keywords) for name in dict.fromkeys(types)]

    def _named(self, kind: str, keywords: dict[str, Any]) -> str:
        """The rule of one type with those of the keywords that apply to it; its body is defined later."""
        own = {name: keywords[name] for name in sorted(KEYWORDS_BY_TYPE.get(kind, {kind}) & set(keywords))}
        if not own:
            return kind
        key = kind, json.dumps(own)
        if key not in self._names:
            self._names[key] = self.grammar.reserve(kind)
            if kind == "enum":
                self._enums[self._names[key]] = [json.dumps(value) for value in own["enum"]]
            self._undefined.append((self._names[key], kind, own))
        return self._names[key]

    def _enum(self, values: list[Any]) -> str:
        self._count_alternatives(len(values))
        return " | ".join(_literal(value) for value in values)

    def _object(self, keywords: dict[str, Any], structure: Structure) -> str:
        properties, additional = keywords.get("properties", {}), keywords.get("additionalProperties", True)
        required = keywords.get("required", [])
        if unknown := [name for name in required if name not in properties]:
            raise _unsupported(f"required {unknown[0]!r} that is not a property")
        if not properties:
            if additional is False:
                return '"{" ws "}"'
            pair = self.grammar.define(
                self.grammar.reserve("pair"), f'string ws ":" ws {self._nested(additional, structure)} ws'
            )
            return f'"{{" ws ({pair} ("," ws {pair})*)? "}}"'
        pairs, required_names = [], set(required)
        for name, one in properties.items():
            body = f'{_literal(name)} ws ":" ws {self._nested(one, structure)} ws'
            pairs.append((self.grammar.define(self.grammar.reserve("pair"), body), name in required_names))
        structure.beginning = self._beginning(properties, required_names, structure)
        return f'"{{" ws {self._pairs(pairs)} "}}"'

    def _beginning(self, properties: dict[str, Any], required: set[str], structure: Structure) -> Beginning:
        beginning: list[tuple[str, list[str]]] = []
        for name, members in zip(properties, structure.values, strict=True):
            if name not in required:
                break
            literals = self._enums.get(members[0], []) if len(members) == 1 else []
            beginning.append((name, literals))
            if any(member.partition("-")[0] not in SCALARS for member in members):
                break
        return beginning

    def _pairs(self, pairs: Sequence[tuple[str, bool]]) -> str:
        """Pairs (rule, required) in order and separated by commas; pairs that are not required can be omitted."""
        optional_count = next((number for number, (_, required) in enumerate(pairs) if required), len(pairs))
        self._count_alternatives(optional_count)
        rest = " ".join(_following(*pair) for pair in pairs[optional_count + 1 :])
        starts = [f"{pair} {rest}" for pair, _ in pairs[optional_count : optional_count + 1]]
        rest = f"{_following(*pairs[optional_count])} {rest}" if starts else ""
        for pair, _ in reversed(pairs[:optional_count]):  # what follows each pair is a rule: copies would be quadratic
            rest = self.grammar.define(self.grammar.reserve("rest"), rest) if rest else ""
            starts.append(f"{pair} {rest}")
            rest = f"{_following(pair, False)} {rest}"
        pairs_rule = self.grammar.define(self.grammar.reserve("pairs"), " | ".join(reversed(starts)))
        return f"{pairs_rule}?" if optional_count == len(pairs) else pairs_rule

    def _array(self, keywords: dict[str, Any], structure: Structure) -> str:
        item = f"{self._nested(keywords.get('items', True), structure)} ws"
        minimum, maximum = _bounds(keywords, "minItems", "maxItems")
        if maximum == 0:
            return '"[" ws "]"'
        more = self.grammar.repetition(max(0, minimum - 1), None if maximum is None else maximum - 1)
        items = f'{item} ("," ws {item}){more}'
        return f'"[" ws {items if minimum else f"({items})?"} "]"'

    def _string(self, keywords: dict[str, Any]) -> str:
        return rf'"\"" char{self.grammar.repetition(*_bounds(keywords, "minLength", "maxLength"))} "\""'

    def _referenced_members(self, path: str) -> list[str]:
        if path not in self._members_by_reference:
            self._members_by_reference[path] = None
            target: object = self._schema
            for step in path.removeprefix("#").strip("/").split("/") if path != "#" else ():
                if not (path.startswith("#") and isinstance(target, dict) and step in target):
                    raise _unsupported(f"$ref {path!r}")
                target = target[step]
            self._members_by_reference[path] = self._members(target)
        members = self._members_by_reference[path]
        if members is None:
            raise _unsupported(f"$ref {path!r} that refers to itself without an object or array in between")
        return members


def _check_keywords(keywords: dict[str, Any], allowed: set[str], context: str) -> None:
    if unknown := sorted(set(keywords) - allowed):
        raise _unsupported(f"keyword {unknown[0]!r} beside {context}")


def _following(pair: str, required: bool) -> str:
    return f'("," ws {pair}){"" if required else "?"}'


def _literal(value: object) -> str:
    """A JSON value as a terminal symbol."""
    text = json.dumps(value, ensure_ascii=False).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def _choices(values: object) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise _unsupported(f"{json.dumps(values)[:60]} instead of a list of choices")
    return values


def _integer(keywords: dict[str, Any]) -> str:
    """Integers of up to 15 digits; bounds are supported where the grammar needs no arithmetic: wide ones, 0 and 1."""
    low = max(
        -MAX_INTEGER, keywords.get("minimum", -MAX_INTEGER), keywords.get("exclusiveMinimum", -MAX_INTEGER - 1) + 1
    )
    high = min(MAX_INTEGER, keywords.get("maximum", MAX_INTEGER), keywords.get("exclusiveMaximum", MAX_INTEGER + 1) - 1)
    starts = {-MAX_INTEGER: '"-"? ("0" | [1-9] [0-9]{0,14})', 0: '"0" | [1-9] [0-9]{0,14}', 1: "[1-9] [0-9]{0,14}"}
    if low not in starts or high < MAX_INTEGER:
        keyword = next(
            name for name in ("maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum") if name in keywords
        )
        raise _unsupported(f"keyword {keyword!r} beside type integer with the value {keywords[keyword]}")
    return starts[low]


def _bounds(keywords: dict[str, Any], minimum: str, maximum: str) -> tuple[int, int | None]:
    bounds = keywords.get(minimum, 0), keywords.get(maximum)
    for name, value in zip((minimum, maximum), bounds, strict=True):
        if value is not None and (type(value) is not int or not 0 <= value <= MAX_REPETITIONS):
            raise _unsupported(f"{name} {value}")
    return bounds


def _unsupported(what: str) -> JsonSchemaError:
    return JsonSchemaError(
        f"the JSON schema has {what}, which this engine does not support", "remove it from the schema"
    )
