"""Decides whether a text matches a GBNF grammar, by following every alternative; for the syntax that gbnf.py writes."""

import re
from collections.abc import Callable

TOKENS = re.compile(r'\s*("(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|\{\d*,?\d*\}|[a-z][a-z0-9-]*|[()|?*])')
Matcher = Callable[[str, int], set[int]]  # text and start position to all possible end positions


def matches(grammar: str, text: str) -> bool:
    """Whether the whole text matches the rule `root`."""
    return len(text) in _Matchers(grammar).rule("root")(text, 0)


class _Matchers:
    def __init__(self, grammar: str) -> None:
        self._bodies = dict(line.split(" ::= ", 1) for line in grammar.splitlines())
        self._matchers: dict[str, Matcher] = {}

    def rule(self, name: str) -> Matcher:
        if name not in self._matchers:
            self._matchers[name] = lambda text, start: self._matchers[name](text, start)  # for recursive rules
            body = self._bodies[name]
            tokens = TOKENS.findall(body)
            assert "".join(tokens).replace(" ", "") == body.replace(" ", "").strip(), body
            self._matchers[name] = self._alternatives(tokens)
            assert not tokens, tokens
        return lambda text, start: self._matchers[name](text, start)

    def _alternatives(self, tokens: list[str]) -> Matcher:
        sequences = [self._sequence(tokens)]
        while tokens and tokens[0] == "|":
            tokens.pop(0)
            sequences.append(self._sequence(tokens))
        return lambda text, start: {end for sequence in sequences for end in sequence(text, start)}

    def _sequence(self, tokens: list[str]) -> Matcher:
        parts = []
        while tokens and tokens[0] not in ("|", ")"):
            part = self._atom(tokens)
            while tokens and tokens[0][0] in "?*{":
                part = _repeated(part, tokens.pop(0))
            parts.append(part)

        def match(text: str, start: int) -> set[int]:
            ends = {start}
            for part in parts:
                ends = {end for position in ends for end in part(text, position)}
            return ends

        return match

    def _atom(self, tokens: list[str]) -> Matcher:
        token = tokens.pop(0)
        if token == "(":
            inner = self._alternatives(tokens)
            assert tokens.pop(0) == ")"
            return inner
        if token[0] in '"[':
            pattern = re.compile(token if token[0] == "[" else re.escape(_unescaped(token[1:-1])))
            return lambda text, start: {found.end()} if (found := pattern.match(text, start)) else set()
        return self.rule(token)


def _unescaped(literal: str) -> str:
    return re.sub(r"\\(.)", lambda found: {"n": "\n"}.get(found[1], found[1]), literal)


def _repeated(part: Matcher, suffix: str) -> Matcher:
    low, _, high = suffix.strip("{}").partition(",") if suffix[0] == "{" else ("0", "", "1" if suffix == "?" else "")
    minimum, maximum = int(low or 0), int(high) if high else 10**9

    def match(text: str, start: int) -> set[int]:
        ends, current, count = ({start} if minimum == 0 else set()), {start}, 0
        while current and count < maximum:
            current = {end for position in current for end in part(text, position)} - (ends if minimum == 0 else set())
            count += 1
            if count >= minimum:
                ends |= current
        return ends

    return match
