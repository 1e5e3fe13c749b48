"""A JSON schema as a grammar that llama.cpp can hold an answer to.

llama.cpp's own translation is of no use here: this build hands a schema to llguidance, which takes a piece's leading
blank for nothing, stops on the first forced byte and leaves the rest of the answer free; and for a schema it does not
understand it writes a line to the log and leaves all of it free. What is not understood here raises an error.
Limits: properties come in the schema's order; none but the listed ones are written, where some are listed.
"""

import json
from collections.abc import Sequence

from entrypoints.errors import UserError

# Blank space is bounded, because a small model can go on with it until the window is full.
BASE = {
    "ws": r'(" " | "\n" [ \t]{0,12})?',
    "char": r'[^"\\\x00-\x1F\x7F] | "\\" ["\\/bfnrt]',
    "string": r'"\"" char* "\""',
    "integer": r'"-"? ("0" | [1-9] [0-9]{0,15})',
    "number": r'integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,3})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "value": "object | array | string | number | boolean | null",
    "pair": 'string ws ":" ws value',
    "object": '"{" ws (pair ws ("," ws pair ws)*)? "}"',
    "array": '"[" ws (value ws ("," ws value ws)*)? "]"',
}
HEADER = r'(" "? "\n")? " "?'  # the empty metadata line and the blank that the model was taught to begin with
# keywords that say nothing about what may be written
NOTES = {
    "$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description", "examples",
    "readOnly", "strict", "title", "writeOnly",
}  # fmt: skip
KEYWORDS = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": {"minLength", "maxLength"},
}
KINDS = ("object", "array", "string", "integer", "number", "boolean", "null")
LONGEST = 2000  # llama.cpp's bound for a repetition


def json_grammar(schema: dict) -> str:
    """GBNF text whose answers are JSON of this schema; `{}` stands for any object.

    Raises UserError naming the first keyword or value that is not understood.
    """
    rules = _Rules(schema)
    try:
        root = rules.expression(schema) if schema else "object"
    except (AttributeError, TypeError, RecursionError) as error:
        raise UserError("the JSON schema is malformed", f"check it ({error})") from error
    lines = [f"root ::= {HEADER} answer", f"answer ::= {root}"]
    return "\n".join([*lines, *(f"{name} ::= {body}" for name, body in (BASE | rules.named).items())]) + "\n"


class _Rules:
    """Turns schemas into expressions; what `$ref` names becomes a rule, so that it may contain itself."""

    def __init__(self, schema: dict) -> None:
        self.named: dict[str, str] = {}
        self._references: dict[str, str] = {}
        self._schema = schema

    def expression(self, schema: object) -> str:
        """What a text must be to fit `schema`; raises UserError for a keyword that cannot be kept to."""
        if schema is True or schema == {}:
            return "value"
        if not isinstance(schema, dict):
            raise _refused(f"{json.dumps(schema)[:60]} in the place of a schema")
        keywords = {name: value for name, value in schema.items() if name not in NOTES}
        if not keywords:
            return "value"
        readers = {
            "$ref": self._reference,
            "const": _literal,
            "enum": lambda values: _any([_literal(value) for value in _list(values)]),
            "anyOf": lambda schemas: _any([self.expression(one) for one in _list(schemas)]),
            "oneOf": lambda schemas: _any([self.expression(one) for one in _list(schemas)]),
        }
        keyword = next((name for name in readers if name in keywords), None)
        if keyword is None:
            return self._typed(keywords)
        value = keywords.pop(keyword)
        if keyword in ("const", "enum"):
            keywords.pop("type", None)  # the values have it already
        self._only(keywords, set(), keyword)
        return readers[keyword](value)

    def _typed(self, keywords: dict) -> str:
        kinds = keywords.pop("type", None) or [kind for kind, names in KEYWORDS.items() if names & set(keywords)]
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not kinds or any(kind not in KINDS for kind in kinds):
            raise _refused(f"type {json.dumps(kinds)}" if kinds else f"keyword {sorted(keywords)[0]!r}")
        self._only(keywords, {name for kind in kinds for name in KEYWORDS.get(kind, ())}, f"type {kinds[0]}")
        structured = {"object": self._object, "array": self._array, "string": self._string}
        return _any([structured[kind](keywords) if kind in structured else kind for kind in kinds])

    def _object(self, keywords: dict) -> str:
        properties, more = keywords.get("properties", {}), keywords.get("additionalProperties", True)
        required = keywords.get("required", [])
        if unknown := [name for name in required if name not in properties]:
            raise _refused(f"required {unknown[0]!r}, which is no property,")
        if not properties:
            if more is False:
                return '"{" ws "}"'
            pair = f'string ws ":" ws ({self.expression(more)})'
            return f'"{{" ws ({pair} ws ("," ws {pair} ws)*)? "}}"'
        pairs = []
        for name, one in properties.items():
            rule = f"pair-{len(self.named)}"
            self.named[rule] = ""  # taken, before the property's own rules are named
            self.named[rule] = f'{_literal(name)} ws ":" ws ({self.expression(one)}) ws'
            pairs.append((rule, name in required))
        return f'"{{" ws {_pairs(pairs)} "}}"'

    def _array(self, keywords: dict) -> str:
        item = f"({self.expression(keywords.get('items', True))}) ws"
        least, most = _bounds(keywords, "minItems", "maxItems")
        if most == 0:
            return '"[" ws "]"'
        further = f'{item} ("," ws {item}){_times(max(0, least - 1), None if most is None else most - 1)}'
        return f'"[" ws {further if least else f"({further})?"} "]"'

    def _string(self, keywords: dict) -> str:
        least, most = _bounds(keywords, "minLength", "maxLength")
        return rf'"\"" char{_times(least, most)} "\""'

    def _reference(self, path: str) -> str:
        if path not in self._references:
            name = self._references[path] = f"ref-{len(self.named)}"
            self.named[name] = ""
            target: object = self._schema
            for step in path.removeprefix("#").strip("/").split("/") if path != "#" else ():
                if not (path.startswith("#") and isinstance(target, dict) and step in target):
                    raise _refused(f"$ref {path!r}")
                target = target[step]
            self.named[name] = self.expression(target)
        return self._references[path]

    def _only(self, keywords: dict, allowed: set[str], where: str) -> None:
        if unknown := sorted(set(keywords) - allowed):
            raise _refused(f"keyword {unknown[0]!r} beside {where}")


def _pairs(pairs: Sequence[tuple[str, bool]]) -> str:
    """Pairs in order, those that are not required possibly left out, with commas between."""

    def following(rest: Sequence[tuple[str, bool]]) -> str:
        return " ".join(f'("," ws {pair}){"" if required else "?"}' for pair, required in rest)

    starts = []
    for number, (pair, required) in enumerate(pairs):
        starts.append(f"{pair} {following(pairs[number + 1 :])}".strip())
        if required:
            return _any(starts)
    return f"{_any(starts)}?"


def _any(expressions: Sequence[str]) -> str:
    return f"({' | '.join(expressions)})"


def _literal(value: object) -> str:
    """A JSON value as a terminal of the grammar."""
    text = json.dumps(value, ensure_ascii=False).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def _list(values: object) -> list:
    if not isinstance(values, list) or not values:
        raise _refused(f"{json.dumps(values)[:60]} in the place of a list of choices")
    return values


def _bounds(keywords: dict, least: str, most: str) -> tuple[int, int | None]:
    bounds = keywords.get(least, 0), keywords.get(most)
    for name, value in zip((least, most), bounds, strict=True):
        if value is not None and (type(value) is not int or not 0 <= value <= LONGEST):
            raise _refused(f"{name} {value}")
    return bounds


def _times(least: int, most: int | None) -> str:
    return f"{{{least},{'' if most is None else most}}}" if least or most is not None else "*"


def _refused(what: str) -> UserError:
    return UserError(f"the JSON schema has {what}: this engine cannot hold an answer to it", "leave it out")
