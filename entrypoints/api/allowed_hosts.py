"""The names that a Host header may have: by DNS rebinding a web page could call a local server under its own name."""

import ipaddress
import re
from collections.abc import Iterable

HOST_PATTERN = re.compile(r"(\[[0-9a-f:.%]+\]|[^:\[\]]*)(:[0-9]*)?", re.ASCII)


class AllowedHosts:
    """Accepts IP addresses, which DNS cannot rebind, `localhost`, and the names given."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {"localhost", *(name.lower() for name in names)}

    def accept(self, header: str) -> bool:
        """Whether a Host header has one of these names. An empty one is accepted: browsers always send a name."""
        parts = HOST_PATTERN.fullmatch(header.lower())
        if not parts:
            return False
        name = parts[1].removeprefix("[").removesuffix("]")
        return not name or name.rstrip(".") in self._names or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
