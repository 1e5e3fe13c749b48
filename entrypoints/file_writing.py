"""Indented JSON, and files that appear when they are complete."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def indented_json(value: Any) -> str:
    """JSON for people to read: two blanks for each level, characters as they are."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def write_json(file: Path, value: Any) -> None:
    """Write indented JSON, UTF-8. Raises OSError."""
    file.write_text(indented_json(value) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replaced_file(file: Path) -> Iterator[Path]:
    """Yield a hidden file beside `file` to write to, which takes its place when the block succeeds.

    After an error the older file is still there and the hidden one is not. Raises OSError.
    """
    partial = file.with_name(f".{file.name}.partial")
    partial.unlink(missing_ok=True)  # in a folder from elsewhere it may be a link
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def replace_text(file: Path, text: str) -> None:
    """Write a small UTF-8 file in one step, in place of an older one. Raises OSError, and the older one stays."""
    with replaced_file(file) as partial:
        partial.write_text(text, encoding="utf-8")
