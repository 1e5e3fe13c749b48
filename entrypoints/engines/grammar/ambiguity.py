"""Bounds how many parses of one answer llama.cpp follows at the same time.

llama.cpp keeps one stack for each possible parse. If two alternatives of a union share a beginning that contains the
same union again, every level doubles the stacks: sixteen levels took two minutes for 39 tokens of a tiny model.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from entrypoints.engines.base import JsonSchemaError

MAX_PARSES = 64
MAX_PASSES = 100
MAX_COMPARED_PROPERTIES = 8

# Required properties at the beginning of an object up to the first one with nested values: name, and the JSON literals
# that the value can be (empty: any text)
Beginning = Sequence[tuple[str, Sequence[str]]]


@dataclass
class Structure:
    """What an object or array rule contains: the member rules of each value, and how an object begins."""

    is_object: bool
    values: list[Sequence[str]] = field(default_factory=list)
    beginning: Beginning = ()


def check_ambiguity(structures: dict[str, Structure]) -> None:
    """Raise JsonSchemaError if more than MAX_PARSES parses of one text can be possible at the same time."""
    parses = dict.fromkeys(structures, 1)
    for _ in range(MAX_PASSES):
        previous = dict(parses)
        for name in reversed(structures):  # rules of nested values were defined later
            values = structures[name].values
            parses[name] = max([1, *(_parses_of_union(members, structures, parses) for members in values)])
            if parses[name] > MAX_PARSES:
                break
        else:
            if parses == previous:
                return
            continue
        break
    raise JsonSchemaError(
        "the JSON schema is ambiguous: nested alternatives begin with the same properties or are arrays alike",
        "begin each alternative with a required property that has its own name or constant",
    )


def _parses_of_union(members: Sequence[str], structures: dict[str, Structure], parses: dict[str, int]) -> int:
    objects = [name for name in members if name in ("object", "value") or _is_object(structures.get(name))]
    arrays = [name for name in members if name in ("array", "value") or _is_array(structures.get(name))]
    beginnings = {name: structures[name].beginning if name in structures else () for name in objects}
    return max(_parses_of_objects(objects, beginnings, parses, 0), _total(arrays, parses))


def _parses_of_objects(
    names: Sequence[str], beginnings: dict[str, Beginning], parses: dict[str, int], depth: int
) -> int:
    """Parses of a text that may be any of these objects, which are equal in their first `depth` properties."""
    if len(names) < 2 or depth == MAX_COMPARED_PROPERTIES or any(len(beginnings[name]) <= depth for name in names):
        return _total(names, parses)
    unconstrained: dict[str, list[str]] = defaultdict(list)  # by property name
    constrained: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))  # by name and literal
    for name in names:
        key, literals = beginnings[name][depth]
        for literal in literals:
            constrained[key][literal].append(name)
        if not literals:
            unconstrained[key].append(name)
    groups = [[*unconstrained[key], *same] for key in [*constrained] for same in constrained[key].values()]
    groups += [same for key, same in unconstrained.items() if key not in constrained]
    return max(_parses_of_objects(group, beginnings, parses, depth + 1) for group in groups)


def _total(names: Sequence[str], parses: dict[str, int]) -> int:
    return sum(parses.get(name, 1) for name in names)


def _is_object(structure: Structure | None) -> bool:
    return structure is not None and structure.is_object


def _is_array(structure: Structure | None) -> bool:
    return structure is not None and not structure.is_object
