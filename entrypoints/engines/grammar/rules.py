"""The rules of one GBNF grammar, and the limits of its size."""

from entrypoints.engines.base import JsonSchemaError

# Whitespace is bounded: a small model may otherwise continue with it until the context is full.
BASE_RULES = {
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
HEADER_RULE = r'(" "? "\n")? " "?'  # ChatGLM3 starts an answer with an empty metadata line and a space
# of one grammar, together
MAX_RULES = 4000
MAX_GRAMMAR_CHARACTERS = 400_000
MAX_GRAMMAR_REPETITIONS = 20_000
MAX_UNION_STEPS = 20_000
MAX_ALTERNATIVES = 1000  # a token of ChatGLM3's vocabulary is compared with each: about a second per answer token


class Grammar:
    """Rules by name; raises JsonSchemaError as soon as the grammar exceeds a limit."""

    def __init__(self) -> None:
        self._rules = {"root": f"{HEADER_RULE} answer", **BASE_RULES}
        self._characters = 0
        self._repetitions = 0

    def reserve(self, prefix: str) -> str:
        """The name of a new rule, which `define` completes."""
        check_limit("rules", len(self._rules), MAX_RULES)
        name = f"{prefix}-{len(self._rules)}"
        self._rules[name] = ""
        return name

    def define(self, name: str, body: str) -> str:
        """Set the body of a rule; its name."""
        self._rules[name] = body
        self._characters += len(body)
        check_limit("characters", self._characters, MAX_GRAMMAR_CHARACTERS)
        return name

    def repetition(self, minimum: int, maximum: int | None) -> str:
        """The suffix for a bounded repetition, which llama.cpp expands to as many elements."""
        self._repetitions += max(minimum, maximum or 0)
        check_limit("repetitions", self._repetitions, MAX_GRAMMAR_REPETITIONS)
        return f"{{{minimum},{'' if maximum is None else maximum}}}" if minimum or maximum is not None else "*"

    def text(self) -> str:
        """All rules, one per line."""
        return "".join(f"{name} ::= {body}\n" for name, body in self._rules.items())


def check_limit(unit: str, count: int, limit: int) -> None:
    """Raise JsonSchemaError above a limit of one grammar."""
    if count > limit:
        problem = f"the grammar of the JSON schema has more than {limit} {unit}"
        raise JsonSchemaError(problem, "use a schema with fewer or smaller parts")
