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


def weights_hash(folder: Path) -> str | None:
    """One hash of all weights in a checkpoint, by what its manifest says; None without a manifest."""
    if not (folder / MANIFEST_FILE).is_file():
        return None
    files = read_manifest(folder)["files"]
    weights = sorted((name, entry["sha256"]) for name, entry in files.items() if name.endswith(".safetensors"))
    return hashlib.sha256(json.dumps(weights).encode()).hexdigest()


def refuse_other_base(adapter: Path, base: Path) -> None:
    """Raise UserError when an adapter's manifest names other weights than those of `base`.

    An adapter that does not say what it was tuned on, and a base without a manifest, are not refused.
    """
    if not (adapter / MANIFEST_FILE).is_file():
        return
    origin = read_manifest(adapter)["provenance"]
    tuned_on, here = origin.get("base_weights"), weights_hash(base)
    if tuned_on and here and tuned_on != here:
        raise UserError(
            f"{adapter} was tuned on {origin.get('base', 'another model')}, whose weights are not those of {base}",
            "use the base it was tuned on: in another precision or tuned further it is another model",
        )


def record_of(file: Path) -> Path:
    """Where the size and the hash of a single file, as a GGUF file is one, stand beside it."""
    return file.with_name(f"{file.name}.json")


def read_record(file: Path) -> dict:
    """The record beside a single file; raises UserError when there is none or it is damaged."""
    record = record_of(file)
    try:
        return dict(json.loads(record.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UserError(f"{record} is missing, so {file} cannot be checked", f"remove {file} too") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{record} is damaged ({error!r})", f"remove {file} and run glm prepare again") from error


def check_record(file: Path) -> None:
    """Compare a single file with the record beside it; raises UserError when its size or contents are others."""
    known = read_record(file)
    if (file.stat().st_size, sha256(file)) != (known.get("size"), known.get("sha256")):
        raise UserError(f"{file} has other contents than when it was made", "remove it and run glm prepare again")


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST_FILE)
