"""The table of clients in the serving guide, which is what the tests expect, and the script of each client."""

import re
from pathlib import Path

FOLDER = Path(__file__).parent
API = FOLDER.parents[1] / "entrypoints" / "api"
NODE = "Node: "
ROW = re.compile(r"^\| (Node: )?`([^`]+)` \| ([\d.]+) \| (.*) \|$", re.M)


def table(guide: str = "README.md") -> dict[str, tuple[str, list[str]]]:
    """{client: (version, cells of its row)}."""
    text = (API / guide).read_text(encoding="utf-8")
    section = re.split(r"^## (?:Clients|客户端)$", text, flags=re.M)[1].partition("\n## ")[0]
    return {
        f"{node}{name}": (version, [cell.strip() for cell in cells.split("|")])
        for node, name, version, cells in ROW.findall(section)
    }


def script(client: str) -> str:
    """File name of a client's script."""
    name = client.removeprefix(NODE).strip("@").replace("/", "_").replace("-", "_")
    return f"with_{name}{'.mjs' if client.startswith(NODE) else '.py'}"
