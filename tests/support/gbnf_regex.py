"""A GBNF grammar as a recursive regular expression; the package regex tells whether a text can still become a match."""

import re

import regex

TERMS = re.compile(r'\s*("(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|\{\d*,?\d*\}|[a-z][a-z0-9-]*|[()|?*])')
ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}


def compile_grammar(grammar: str) -> "regex.Pattern[str]":
    """The pattern that fully matches what the rule `root` matches."""
    rules = dict(line.split(" ::= ", 1) for line in grammar.splitlines())
    definitions = "".join(f"(?P<{_group(name)}>{_expression(body)})" for name, body in rules.items())
    return regex.compile(f"(?(DEFINE){definitions})(?&root)")


def _group(rule: str) -> str:
    return rule.replace("-", "_")


def _expression(body: str) -> str:
    parts = []
    for term in TERMS.findall(body):
        if term[0] == '"':
            text = re.sub(r"\\(.)", lambda escape: ESCAPES.get(escape[1], escape[1]), term[1:-1])
            parts.append(f"(?:{regex.escape(text)})")
        elif term[0].isalpha():
            parts.append(f"(?&{_group(term)})")
        else:
            parts.append("(?:" if term == "(" else term)
    return "".join(parts)
