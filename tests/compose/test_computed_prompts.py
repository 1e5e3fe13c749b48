"""`--warm` and `--prefix-cache` have a place in the container of the API; read from the files, without Docker."""

import re

import yaml
from containers import REPOSITORY

from entrypoints.__main__ import parse_arguments

SERVE = yaml.safe_load((REPOSITORY / "compose" / "serve.yaml").read_text(encoding="utf-8"))
COMMON = yaml.safe_load((REPOSITORY / "compose" / "common.yaml").read_text(encoding="utf-8"))["services"]


def mounts(service: dict) -> dict[str, tuple[str, bool]]:
    """Source, and whether it can be written, of each mounted path."""
    defaults = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", entry) for entry in service["volumes"]]
    parts = [entry.split(":") for entry in defaults]
    return {target: (source, "ro" not in mode) for source, target, *mode in parts}


def documented_flags() -> list[str]:
    """The value of SERVE_ARGS in the documentation; both languages have the same."""
    found = set()
    for name in ("README.md", "README.zh-CN.md"):
        text = (REPOSITORY / "compose" / name).read_text(encoding="utf-8")
        found |= set(re.findall(r"`SERVE_ARGS=(--warm [^`]*)`", text))
    (flags,) = found
    return flags.split()


def test_the_documented_flags_name_a_read_only_mount_and_a_writable_volume():
    api = mounts(SERVE["services"]["api"])
    args = parse_arguments(["serve", *documented_flags()])[1]
    assert api[f"{args.warm}"] == ("/dev/null", False)
    assert api[f"{args.prefix_cache}"] == ("prefixes", True)
    example = (REPOSITORY / ".env.example").read_text(encoding="utf-8")
    assert f"--warm {args.warm}" in example
    assert "WARM_FILE=" in example
    assert f"--prefix-cache {args.prefix_cache}" in example


def test_the_volume_belongs_to_the_user_of_the_container():
    """Docker gives a new volume the owner and mode of the folder in the image."""
    script = (REPOSITORY / "images" / "scripts" / "system").read_text(encoding="utf-8")
    created = re.search(r"^install -d -m 0775 -o 10001 -g 0 (.*)$", script, re.MULTILINE)[1].split()
    assert {"/usage", "/pages", "/prefixes"} <= set(created)
    assert COMMON["glm"]["user"] == "10001:0"
    assert "prefixes" in SERVE["volumes"]


def test_backups_leave_computed_prompts_out():
    """They contain conversations, and are computed again."""
    assert sorted(mounts(COMMON["archive"])) == ["/outputs", "/pages", "/usage"]
