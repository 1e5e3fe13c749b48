"""Damaged files and hostile JSON by chance: the same ones for the same random generator."""

import copy
import json
import random
import struct
from typing import Any

HOSTILE_TEXTS = (
    "", " ", "a", "²", "٣", "\x00", "\x1b[2J\x1b]0;x\x07", "\r\n", "\u2028", "\u202e\u2066txt.exe", "\ufeff", "\ud800",
    "../../etc/passwd", "/etc/passwd", "C:\\x", "f\x00.json", "<script>alert(1)</script>", "'\"><img src=x onerror=a>",
    "javascript:a", "{{7*7}}", "${x}", "%s%n", "[a](javascript:b)", "![a](http://b)", "| a | b |", "é", "é", "👩‍👩‍👧",
    "x" * 300, "你" * 5000, "a" * 200_000, "NaN", "1e999", "-1", "true", "null", "0x10", "𝟙",
)  # fmt: skip
HOSTILE_NUMBERS = (
    0, -0.0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1,
    10**30, 10**400, 0.1, 5e-324, 1e-300, 1e300, 1.7976931348623157e308, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
HOSTILE_VALUES = (None, True, False, [], {}, [[]], [None], {"": None}, *HOSTILE_TEXTS, *HOSTILE_NUMBERS)
NUMBER_FORMATS = ("<B", "<H", "<I", "<Q", "<f", "<d")


def hostile_value(chance: random.Random, depth: int = 0) -> Any:
    """A value of any JSON type; some are nested."""
    if depth < 3 and chance.random() < 0.2:
        items = [hostile_value(chance, depth + 1) for _ in range(chance.randrange(4))]
        return items if chance.random() < 0.5 else {chance.choice(HOSTILE_TEXTS): item for item in items}
    return chance.choice(HOSTILE_VALUES)


def damage_bytes(data: bytes, chance: random.Random, limit: int | None = None) -> bytes:
    """Copy of `data` with one to four changes, all within the first `limit` bytes."""
    content = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        end = min(len(content), limit or len(content))
        place = chance.randrange(end + 1)
        size = min(chance.choice((1, 1, 2, 4, 8, 64, 1024)), end - place)
        change = chance.randrange(7)
        if change == 0 and end:
            content[min(place, end - 1)] ^= 1 << chance.randrange(8)
        elif change == 1:
            content[place : place + size] = chance.randbytes(size)
        elif change == 2:
            del content[place:]
        elif change == 3:
            del content[place : place + size]
        elif change == 4:
            content[place:place] = content[place : place + size] * chance.choice((1, 3))
        elif change == 5:
            kind = chance.choice(NUMBER_FORMATS)
            content[place : place + struct.calcsize(kind)] = _packed(kind, chance)
        else:
            other = chance.randrange(end + 1)
            content[place : place + size] = content[other : other + size]
    return bytes(content)


def damage_json(value: Any, chance: random.Random) -> Any:
    """Copy of a JSON value in which one to three places are replaced, removed, renamed or wrapped."""
    root = {"": copy.deepcopy(value)}
    for _ in range(chance.choice((1, 1, 2, 3))):
        parent, key = chance.choice(list(_places(root)))
        change = chance.randrange(6)
        if change == 0 and parent is not root:
            del parent[key]
        elif change == 1 and isinstance(parent, dict) and parent is not root:
            parent[chance.choice(HOSTILE_TEXTS)] = parent.pop(key)
        elif change == 2:
            parent[key] = chance.choice(([parent[key]], {"a": parent[key]}, json.dumps(parent[key], default=str)))
        elif change == 3 and isinstance(parent[key], list):
            parent[key] = parent[key] * chance.choice((2, 100))
        elif change == 4:
            source, name = chance.choice(list(_places(root)))
            parent[key] = copy.deepcopy(source[name])
        else:
            parent[key] = hostile_value(chance)
    return root[""]


def damage_json_text(value: Any, chance: random.Random) -> bytes:
    """Bytes of a file that should hold `value`: mostly another JSON value, sometimes not JSON."""
    kind = chance.randrange(12)
    if kind == 0:
        return damage_bytes(json.dumps(value).encode(), chance)
    if kind == 1:
        depth = chance.choice((50, 900, 100_000))
        return chance.choice((b"[", b'{"a":')) * depth
    if kind == 2:
        return chance.choice((b"", b"null", b"[]", b"{}", b"1" * 5000, b'"a"', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"\0"))
    text = json.dumps(damage_json(value, chance), ensure_ascii=chance.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Container and key of every value below a value."""
    found, pending = [], [value]
    while pending:
        container = pending.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], dict | list):
                pending.append(container[key])
    return found


def _packed(kind: str, chance: random.Random) -> bytes:
    if kind in ("<f", "<d"):
        return struct.pack(kind, chance.choice((0.0, -1.0, float("nan"), float("inf"), 1e38)))
    limit = 256 ** struct.calcsize(kind) - 1
    return struct.pack(
        kind, chance.choice((0, 1, limit, limit // 2, limit // 2 + 1, limit - 7, chance.randint(0, limit)))
    )
