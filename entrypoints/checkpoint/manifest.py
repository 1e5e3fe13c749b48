"""manifest.json: size and SHA-256 of every file of a checkpoint, where it came from, and the checks against it."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from entrypoints.errors import UserError

MANIFEST_FILE = "manifest.json"


def sha256(file: Path, progress: Callable[[int], object] | None = None) -> str:
    """Hex digest of a file, read in blocks; `progress` is told the bytes of each."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            if progress:
                progress(len(block))
    return digest.hexdigest()


def write_manifest(folder: Path, provenance: dict, files: Iterable[Path] | None = None) -> None:
    """Describe every file in `folder`, or only `files`; `provenance` says how the folder was made."""
    entries = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in (_files(folder) if files is None else files)
    }
    text = json.dumps({"version": 1, "provenance": provenance, "files": entries}, indent=2, ensure_ascii=False)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict:
    """The manifest; raises UserError when there is none or it is damaged."""
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise UserError(f"{folder} holds no {MANIFEST_FILE}", "convert the checkpoint first: glm convert SRC DST")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        files = {
            name: {"size": entry["size"], "sha256": entry["sha256"]} for name, entry in dict(manifest["files"]).items()
        }
        return {"provenance": dict(manifest["provenance"]), "files": files}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r})", "convert the checkpoint again") from error


def check_manifest(folder: Path, hashes: bool, progress: Callable[[int], object] | None = None) -> int:
    """Compare sizes, and contents with `hashes`, of all files; returns how many were checked.

    Raises UserError naming every file that is missing, or differs in size or content.
    """
    files = read_manifest(folder)["files"]
    wrong = []
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            wrong.append(f"{name} is missing")
        elif file.stat().st_size != entry["size"]:
            wrong.append(f"{name} has {file.stat().st_size} bytes, not {entry['size']}")
        elif hashes and sha256(file, progress) != entry["sha256"]:
            wrong.append(f"{name} has other contents")
    if wrong:
        raise UserError(f"{folder}: {'; '.join(wrong)}", "copy or convert the checkpoint again")
    return len(files)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST_FILE)
