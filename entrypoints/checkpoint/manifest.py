"""manifest.json: size and SHA-256 of every file of a checkpoint and its provenance, and the checks against it."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypedDict

from entrypoints.checkpoint.prompt_file import read_prompt_format
from entrypoints.errors import UserError
from entrypoints.file_writing import write_json
from entrypoints.untrusted import confined_path, read_json_file

MANIFEST_FILE = "manifest.json"
HASH_BLOCK_BYTES = 1 << 20
# neither advises to delete a file, which may be good
NEW_FILE_REMEDY = "copy it again, or move it elsewhere and run glm prepare or glm quantize again"
NO_RECORD_REMEDY = "copy the record too, or move the file elsewhere and run glm prepare or glm quantize again"

Progress = Callable[[int], object]  # called with the number of bytes processed since the last call


class FileEntry(TypedDict):
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


class Manifest(TypedDict):
    """Contents of manifest.json."""

    provenance: dict[str, Any]
    files: dict[str, FileEntry]  # by path relative to the folder


def sha256(file: Path, progress: Progress | None = None) -> str:
    """Hex digest of a file, read in blocks; `progress` is called with the size of each block."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(HASH_BLOCK_BYTES):
            digest.update(block)
            if progress:
                progress(len(block))
    return digest.hexdigest()


def write_manifest(folder: Path, provenance: dict[str, Any], files: Iterable[Path] | None = None) -> None:
    """Describe every file in `folder`, or only `files`. provenance: how the folder was created."""
    entries = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in (_files(folder) if files is None else files)
    }
    write_json(folder / MANIFEST_FILE, {"version": 1, "provenance": provenance, "files": entries})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder. Raises UserError: it is missing or damaged, or names a file outside the folder."""
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise UserError(f"{folder} contains no {MANIFEST_FILE}", "convert the checkpoint first: glm convert SRC DST")
    try:
        manifest = read_json_file(file, "convert the checkpoint again")
        files: dict[str, FileEntry] = {
            name: {"size": entry["size"], "sha256": entry["sha256"]} for name, entry in dict(manifest["files"]).items()
        }
        for name in files:
            confined_path(folder, name, file, linked_weights=True)
        return {"provenance": dict(manifest["provenance"]), "files": files}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r})", "convert the checkpoint again") from error


def check_manifest(folder: Path, hashes: bool, progress: Progress | None = None) -> int:
    """Compare the sizes of all files, and with `hashes` their contents; returns how many were checked.

    Raises UserError naming every file that is missing, or differs in size or content.
    """
    files = read_manifest(folder)["files"]
    problems = []
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != entry["size"]:
            problems.append(f"{name} has {file.stat().st_size} bytes, not {entry['size']}")
        elif hashes and sha256(file, progress) != entry["sha256"]:
            problems.append(f"{name} does not match its SHA-256")
    if problems:
        raise UserError(f"{folder}: {'; '.join(problems)}", "copy or convert the checkpoint again")
    return len(files)


def weights_fingerprint(folder: Path) -> str | None:
    """One hash of all weight files of a checkpoint, from its manifest; None without a manifest."""
    if not (folder / MANIFEST_FILE).is_file():
        return None
    files = read_manifest(folder)["files"]
    weights = sorted((name, entry["sha256"]) for name, entry in files.items() if name.endswith(".safetensors"))
    return hashlib.sha256(json.dumps(weights).encode()).hexdigest()


def check_base_weights(adapter: Path, base: Path) -> None:
    """Raises UserError: `adapter` is of another model family, or its manifest names other base weights than `base` has.

    An adapter whose manifest names no base, and a base without a manifest, pass.
    """
    made_for, family = (read_prompt_format(folder).family for folder in (adapter, base))
    if made_for != family:
        raise UserError(
            f"{adapter} was made for the model family {made_for}, {base} is of {family}",
            f"use a base model of its family; if it was converted, convert it again with --family {family}",
        )
    if not (adapter / MANIFEST_FILE).is_file():
        return
    provenance = read_manifest(adapter)["provenance"]
    trained_on, actual = provenance.get("base_weights"), weights_fingerprint(base)
    if trained_on and actual and trained_on != actual:
        raise UserError(
            f"{adapter} was tuned on {provenance.get('base', 'another model')}, whose weights are not those of {base}",
            "use the base it was tuned on, in the same precision and without further fine-tuning",
        )


def record_path(file: Path) -> Path:
    """Path of the JSON record with size and SHA-256 of a single file, such as a GGUF file."""
    return file.with_name(f"{file.name}.json")


def write_file_record(file: Path, content: Path, made_from: str | None = None) -> None:
    """Write the record of `file`, whose bytes are those of `content`: the same file before it is renamed.

    made_from: SHA-256 of the manifest of the checkpoint that the file was created from, if it is nothing but that.
    """
    fields = {"size": content.stat().st_size, "sha256": sha256(content)}
    fields |= {"made_from": made_from} if made_from else {}
    write_json(record_path(file), fields)


def read_file_record(file: Path) -> dict[str, Any]:
    """The record of a single file. Raises UserError: it is missing or damaged."""
    record = record_path(file)
    try:
        return dict(read_json_file(record, NO_RECORD_REMEDY))
    except FileNotFoundError as error:
        raise UserError(f"{record} is missing, so {file} cannot be checked", NO_RECORD_REMEDY) from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{record} is damaged ({error!r})", NO_RECORD_REMEDY) from error


def check_file_record(file: Path) -> None:
    """Compare a single file with its record. Raises UserError: size or SHA-256 differ, or the record is missing."""
    record = read_file_record(file)
    if (file.stat().st_size, sha256(file)) != (record.get("size"), record.get("sha256")):
        raise UserError(f"{file} does not match its SHA-256", NEW_FILE_REMEDY)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST_FILE)
