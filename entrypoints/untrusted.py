"""Names and JSON texts that come from outside: hub listings, records, indexes, archives, configurations.

Every such path goes through `confined_path`, every such JSON text through `parse_json`, and JSON lines through
`read_json_lines`.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from entrypoints.errors import UserError

MAX_PATH_BYTES = 1024
MAX_NAME_BYTES = 255  # of one component, the limit of Linux file systems
MAX_JSON_BYTES = 256 << 20  # the largest legitimate text, tokenizer.json, has about 10 MB
WEIGHT_SUFFIXES = (".safetensors", ".bin")
OTHER_SOURCE = "use files from a source you trust"


def confined_path(folder: Path, name: object, source: object, linked_weights: bool = False) -> Path:
    """`folder / name`, for a relative POSIX path that was read from `source`.

    linked_weights: for a file that is only read, accept a link from a weights file to another one, on another disk or
    in the Hugging Face cache. Raises UserError: it is not such a path, or leads outside the folder by `..` or another
    symbolic link. A snapshot folder of the Hugging Face cache may link to the blobs of the same repository.
    """
    if not isinstance(name, str) or not _is_plain_path(name):
        raise UserError(f"{source} names {name!r:.200}, which is not a relative path inside its folder", OTHER_SOURCE)
    path = folder / PurePosixPath(name)
    root, actual = Path(os.path.realpath(folder)), Path(os.path.realpath(path))  # realpath accepts a loop of links
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not (
        actual.is_relative_to(root) or actual.is_relative_to(blobs) or (linked_weights and _are_weights(path, actual))
    ):
        raise UserError(f"{source} names {name}, which is a link to {actual}, outside {folder}", OTHER_SOURCE)
    return path


def parse_json(text: str | bytes, source: object, remedy: str = "download the file again") -> Any:
    """The value of a JSON text. Raises UserError naming `source`: it is too large, not JSON, or nested too deeply."""
    if len(text) > MAX_JSON_BYTES:
        raise UserError(f"{source} has more than {MAX_JSON_BYTES >> 20} MB of JSON", remedy)
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError as error:
        raise UserError(f"{source} is nested too deeply", remedy) from error
    except ValueError as error:  # also invalid UTF-8, and an integer of more than 4,300 digits
        raise UserError(f"{source} is not valid JSON ({error})", remedy) from error


def read_json_file(file: Path, remedy: str = "download the file again") -> Any:
    """The value in a JSON file, UTF-8. Raises UserError as `parse_json`, OSError: the file cannot be read."""
    with file.open("rb") as stream:
        return parse_json(stream.read(MAX_JSON_BYTES + 1), file, remedy)


def read_json_lines(file: Path, last_bytes: int | None = None) -> Iterator[dict[str, Any] | None]:
    """The objects of a JSON lines file; None for each other line, such as one that a crash cut short.

    last_bytes: read only the end of a longer file. Raises OSError.
    """
    with file.open("rb") as stream:
        if last_bytes is not None:
            stream.seek(max(0, file.stat().st_size - last_bytes))
        for line in stream:
            if line.strip():
                yield _parse_object(line)


def _parse_object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _are_weights(link: Path, target: Path) -> bool:
    """Whether both are weights of one format; the cache names a file by its hash, without a suffix."""
    in_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return link.suffix in WEIGHT_SUFFIXES and (target.suffix == link.suffix or in_cache)


def _is_plain_path(name: str) -> bool:
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        return False
    try:
        sizes = [len(part.encode()) for part in path.parts]
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return max(sizes) <= MAX_NAME_BYTES and sum(sizes) + len(sizes) <= MAX_PATH_BYTES
