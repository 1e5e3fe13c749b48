"""Follows a grammar (GBNF) byte by byte: which states an answer can be in, and which bytes can come next.

A state is the set of all positions in the grammar that the answer can have reached, each with a stack of the rules to
return to. States are computed when they are first reached, and reached again by a look-up.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

TERMS = re.compile(r'\s*("(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|\{\d*,?\d*\}|[a-z][a-z0-9-]*|[()|?*])')
ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}
ASCII = [chr(code) for code in range(0x80)]
MAX_STATES = 5000  # of one answer, before they are forgotten
CONTINUATION = range(0x80, 0xC0)
# the bytes of all other characters in UTF-8, without surrogates
OTHER_CHARACTERS: Sequence[Sequence[Collection[int]]] = (
    (range(0xC2, 0xE0), CONTINUATION),
    (range(0xE0, 0xE1), range(0xA0, 0xC0), CONTINUATION),
    ((*range(0xE1, 0xED), 0xEE, 0xEF), CONTINUATION, CONTINUATION),
    (range(0xED, 0xEE), range(0x80, 0xA0), CONTINUATION),
    (range(0xF0, 0xF1), range(0x90, 0xC0), CONTINUATION, CONTINUATION),
    (range(0xF1, 0xF4), CONTINUATION, CONTINUATION, CONTINUATION),
    (range(0xF4, 0xF5), range(0x80, 0x90), CONTINUATION, CONTINUATION),
)


@dataclass(eq=False, slots=True)
class _Node:
    """One position: reads one of `accepted`, or continues at all `branches`, or enters `rule`; then comes `next`."""

    accepted: Collection[int] = ()
    branches: Sequence["_Node"] = ()
    rule: str = ""
    next: "_Node | None" = None  # None: the end of a rule, which reads nothing


@dataclass(eq=False, slots=True)
class _Frame:
    """Where to continue at the end of a rule."""

    node: _Node
    parent: "_Frame | None"


Position = tuple[_Node, _Frame | None]
END = _Node()


@dataclass(eq=False, slots=True)
class State:
    """All positions at which the answer can be; `accepts` if it can end here."""

    positions: Collection[Position]
    accepts: bool
    following: dict[int, "State | None"] = field(default_factory=dict)  # by the next byte; None: it cannot come


class GrammarStates:
    """The states of one answer."""

    def __init__(self, grammar: str) -> None:
        self._bodies = dict(line.split(" ::= ", 1) for line in grammar.split("\n") if line)
        self._rules: dict[str, _Node] = {}
        self._frames: dict[Position, _Frame] = {}
        self._states: dict[tuple[frozenset[Position], bool], State] = {}

    def start(self) -> State:
        """The state of an empty answer."""
        return self._state([(self._rule("root"), None)])

    def advance(self, state: State, data: bytes) -> State | None:
        """The state after these bytes; None if they cannot come."""
        for byte in data:
            found = state.following.get(byte)
            if found is None:
                if byte in state.following:
                    return None
                targets = [(node.next or END, frame) for node, frame in state.positions if byte in node.accepted]
                found = state.following[byte] = self._state(targets) if targets else None
                if found is None:
                    return None
            state = found
        return state

    def compact(self, state: State) -> State:
        """The same state without the memory of the others, if these are many."""
        if len(self._states) < MAX_STATES:
            return state
        self._states.clear()
        self._frames.clear()
        return State(state.positions, state.accepts)

    def _state(self, positions: Iterable[Position]) -> State:
        reading: list[Position] = []
        accepts, pending, seen = False, list(positions), set[Position]()
        while pending:
            position = pending.pop()
            if position in seen:
                continue
            seen.add(position)
            node, frame = position
            if node.accepted:
                reading.append(position)
            elif node.branches:
                pending += [(branch, frame) for branch in node.branches]
            elif node.rule:
                pending.append((self._rule(node.rule), self._return_to(node.next or END, frame)))
            elif frame is None:
                accepts = True
            else:
                pending.append((frame.node, frame.parent))
        return self._states.setdefault((frozenset(reading), accepts), State(reading, accepts))

    def _return_to(self, node: _Node, parent: _Frame | None) -> _Frame | None:
        """One frame for equal stacks; none for the last term of a rule, so that repetition by recursion needs none."""
        if node is END:
            return parent
        return self._frames.setdefault((node, parent), _Frame(node, parent))

    def _rule(self, name: str) -> _Node:
        if name not in self._rules:
            self._rules[name] = _alternatives(TERMS.findall(self._bodies[name])[::-1]).before(END)
        return self._rules[name]


@dataclass(frozen=True, slots=True)
class _Text:
    data: bytes

    def before(self, following: _Node) -> _Node:
        """The node of this text, after which `following` comes; likewise for the other terms."""
        for byte in reversed(self.data):
            following = _Node((byte,), next=following)
        return following


@dataclass(frozen=True, slots=True)
class _Class:
    ascii: frozenset[int]
    has_others: bool

    def before(self, following: _Node) -> _Node:
        branches = [_Node(self.ascii, next=following)]
        for ranges in OTHER_CHARACTERS if self.has_others else ():
            node = following
            for accepted in reversed(ranges):
                node = _Node(accepted, next=node)
            branches.append(node)
        return _Node(branches=branches)


@dataclass(frozen=True, slots=True)
class _Rule:
    name: str

    def before(self, following: _Node) -> _Node:
        return _Node(rule=self.name, next=following)


@dataclass(frozen=True, slots=True)
class _Sequence:
    terms: Sequence["_Term"]

    def before(self, following: _Node) -> _Node:
        for term in reversed(self.terms):
            following = term.before(following)
        return following


@dataclass(frozen=True, slots=True)
class _Alternatives:
    terms: Sequence["_Term"]

    def before(self, following: _Node) -> _Node:
        return _Node(branches=[term.before(following) for term in self.terms])


@dataclass(frozen=True, slots=True)
class _Repeated:
    term: "_Term"
    minimum: int
    maximum: int | None

    def before(self, following: _Node) -> _Node:
        if self.maximum is None:
            node = _Node()
            node.branches = [self.term.before(node), following]
        else:
            node = following
            for _ in range(self.maximum - self.minimum):
                node = _Node(branches=[self.term.before(node), following])
        for _ in range(self.minimum):
            node = self.term.before(node)
        return node


_Term = _Text | _Class | _Rule | _Sequence | _Alternatives | _Repeated


def _alternatives(terms: list[str]) -> _Term:
    """Parse up to the end or a closing parenthesis; `terms` are reversed, and those that are parsed are removed."""
    sequences = [_sequence(terms)]
    while terms and terms[-1] == "|":
        terms.pop()
        sequences.append(_sequence(terms))
    return sequences[0] if len(sequences) == 1 else _Alternatives(sequences)


def _sequence(terms: list[str]) -> _Term:
    parts: list[_Term] = []
    while terms and terms[-1] not in ("|", ")"):
        part = _single(terms)
        while terms and terms[-1][0] in "?*{":
            part = _Repeated(part, *_counts(terms.pop()))
        parts.append(part)
    return _Sequence(parts)


def _single(terms: list[str]) -> _Term:
    term = terms.pop()
    if term == "(":
        inner = _alternatives(terms)
        terms.pop()  # ")"
        return inner
    if term[0] == '"':
        return _Text(re.sub(r"\\(.)", lambda escape: ESCAPES.get(escape[1], escape[1]), term[1:-1]).encode())
    if term[0] == "[":
        matches = re.compile(term).match
        return _Class(frozenset(ord(one) for one in ASCII if matches(one)), matches("\u4e00") is not None)
    return _Rule(term)


def _counts(suffix: str) -> tuple[int, int | None]:
    if suffix[0] != "{":
        return 0, 1 if suffix == "?" else None
    minimum, comma, maximum = suffix[1:-1].partition(",")
    return int(minimum or 0), int(maximum) if maximum else None if comma else int(minimum)
