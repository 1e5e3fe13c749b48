"""The model store: a folder of converted checkpoints and GGUF files, each of which appears atomically.

An existing model is verified against its hashes and left alone, so preparing it again costs only reading it.
An interrupted download resumes; conversion and quantization start again.
"""

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from entrypoints.checkpoint.adapters import PREFIX_FILE, is_adapter
from entrypoints.checkpoint.atomic_files import access_error, atomic_folder, exclusive_lock, require_disk_space
from entrypoints.checkpoint.manifest import (
    MANIFEST_FILE,
    check_file_record,
    check_manifest,
    read_file_record,
    read_manifest,
    record_path,
    sha256,
    weights_fingerprint,
    write_file_record,
    write_manifest,
)
from entrypoints.checkpoint.prompt_file import read_prompt_format
from entrypoints.checkpoint.tensor_files import read_json
from entrypoints.errors import UserError
from entrypoints.families import family_named
from entrypoints.hub.model_lookup import find_model, user_and_group
from entrypoints.settings import Settings

logger = logging.getLogger(__name__)
DEMO = "demo"
DEMO_BYTES = 100_000_000  # temporary disk space for creating the demo model
DOWNLOADS = ".downloads"  # inside the store, so that a download resumes after a restart; removed after conversion

# (adapter, base, target): writes the model folder target
Merge = Callable[[Path, Path, Path], object]
# (folder, target, GGUF type, validate): writes target, and calls validate with the finished file before publishing it
Quantize = Callable[[Path, Path, str, Callable[[Path], object]], object]


@dataclass(frozen=True)
class PrepareOptions:
    """Where a model comes from."""

    settings: Settings
    create_demo: Callable[[Path], Path]  # creates the demo checkpoint in an empty folder; returns its folder
    merge: Merge  # of a LoRA into its base model
    source: str = "auto"  # hub: one of download.SOURCES, or "auto"
    look_in: Sequence[Path] = ()  # folders with further models, by name
    family: str | None = None  # of a model in the original layout; None: its files tell


def prepare_model(store: Path, model: str, options: PrepareOptions) -> Path:
    """Put a model into the store and return its folder; of two processes at once, one does the work.

    model: "demo", a hub's ORG/NAME, a folder in either layout, or the name of a folder below one of `look_in`.
    Raises UserError: the model is not found or damaged, or the store is not writable.
    """
    name, folder = (DEMO, None) if model == DEMO else find_model(model, [*options.look_in, store])
    target = store / name
    with _exclusive(store, name):
        if target.is_dir():
            if not folder or not _has_changed(folder, target):
                _verify(target)
                _check_family(target, options.family)
                return target
            logger.info("%s has changed since it was copied", folder)
        if model == DEMO:
            with _scratch_folder(store) as scratch:
                _copy(options.create_demo(scratch), target)
        elif folder:
            _convert_or_copy(folder, target, [store, *options.look_in], options)
        else:
            _download_and_convert(model, target, store, options)
    return target


def prepare_gguf(folder: Path, type_: str, quantize: Quantize) -> Path:
    """The GGUF file of a folder of the store, created if it is missing or the folder has changed since.

    Its size and SHA-256 are written to a record beside it. An older file is served until its successor is complete, so
    the disk holds both. Raises UserError: the file is damaged.
    """
    target = folder.with_name(f"{folder.name}-{type_}.gguf")
    made_from = sha256(folder / MANIFEST_FILE)
    with _exclusive(folder.parent, target.name):
        fresh = target
        if target.is_file():
            known = read_file_record(target).get("made_from")
            if known is None:
                raise UserError(f"{target} was created by another command", "move it elsewhere: glm prepare creates it")
            if known == made_from:
                check_file_record(target)
                logger.info("%s exists and matches its SHA-256", target)
                return target
            logger.info("%s was created from an earlier version of %s", target, folder)
            fresh = target.with_name(f".{target.name}")
            fresh.unlink(missing_ok=True)  # left by a killed process

        def write_record(finished: Path) -> None:
            write_file_record(fresh, finished, made_from)

        logger.info("quantizing %s", folder)
        quantize(folder, fresh, type_, write_record)
        if fresh != target:  # the file first: with the older record beside it, the next run quantizes again
            fresh.replace(target)
            record_path(fresh).replace(record_path(target))
    return target


@contextlib.contextmanager
def _exclusive(store: Path, name: str) -> Iterator[None]:
    """Wait for other processes that prepare the same model.

    Raises UserError: the store is not writable, or a file of the model is not readable.
    """
    is_locked = False
    try:
        with exclusive_lock(store / f".{name.replace('/', '.')}.prepare.lock", f"is preparing {store / name}"):
            is_locked = True
            yield
    except OSError as error:
        if is_locked and isinstance(error, PermissionError) and error.filename:
            raise access_error(error) from error
        raise UserError(
            f"cannot write in {store} ({error.strerror or error})",
            f"it needs free space and must be writable for {user_and_group()}",
        ) from error


@contextlib.contextmanager
def _scratch_folder(store: Path) -> Iterator[Path]:
    scratch = store / f".{DEMO}.scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    require_disk_space(store, DEMO_BYTES)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _has_changed(folder: Path, target: Path) -> bool:
    """Was a native folder rewritten, as a training run does, after it was copied or merged into the store?"""
    if is_adapter(folder):
        merged_from = read_manifest(target)["provenance"].get("source_manifest")
        return (folder / MANIFEST_FILE).is_file() and merged_from != sha256(folder / MANIFEST_FILE)
    if not (folder / MANIFEST_FILE).is_file() or _is_original(folder):
        return False
    return read_manifest(folder)["files"] != read_manifest(target)["files"]


def _verify(target: Path) -> None:
    try:
        count = check_manifest(target, hashes=True)
    except UserError as error:
        raise UserError(
            error.problem, f"move {target} elsewhere and run this command again, which recreates it"
        ) from error
    logger.info("%s exists: %d files match the manifest", target, count)


def _check_family(folder: Path, family: str | None) -> None:
    """Raises UserError: the converted folder belongs to another family than `family`."""
    found = read_prompt_format(folder).family
    if family and family != found:
        raise UserError(
            f"{folder} is a {family_named(found).title} model, which --family {family} contradicts",
            f"omit --family, or move {folder} elsewhere and run this command again",
        )


def _is_original(folder: Path) -> bool:
    is_original: bool = read_json(folder / "config.json").get("model_type") == "chatglm"
    return is_original


def _is_foreign_native(folder: Path) -> bool:
    from entrypoints.checkpoint.adoption import is_foreign_native

    return is_foreign_native(folder)


def _convert_or_copy(folder: Path, target: Path, look_in: Sequence[Path], options: PrepareOptions) -> None:
    if is_adapter(folder):
        base = _base_of_adapter(folder, look_in)
        logger.info("merging %s into %s", folder, base)
        options.merge(folder, base, target)
        return
    if _is_original(folder) or _is_foreign_native(folder):
        _convert(folder, target, options.family)
    else:
        _check_family(folder, options.family)
        _copy(folder, target)


def _base_of_adapter(adapter: Path, look_in: Sequence[Path]) -> Path:
    """The folder in the store or in `look_in` with the weights that the adapter was tuned on.

    Raises UserError: no such folder, or the adapter cannot be merged.
    """
    has_manifest = (adapter / MANIFEST_FILE).is_file()
    provenance = read_manifest(adapter)["provenance"] if has_manifest else {}
    name, weights = provenance.get("base", "the base model"), provenance.get("base_weights")
    candidates = [folder for parent in look_in if parent.is_dir() for folder in _model_folders(parent)]
    base = next((folder for folder in candidates if weights and weights_fingerprint(folder) == weights), None)
    if (adapter / PREFIX_FILE).is_file():
        raise UserError(
            f"{adapter} is a P-Tuning v2 prefix, which cannot be merged into a model",
            f"serve its base model with it: MODEL={base.name if base else name} and glm serve --engine transformers "
            f"--adapter {adapter.name}={adapter}",
        )
    if not weights:
        raise UserError(
            f"{adapter} is an adapter, and its manifest does not name its base model",
            f"merge it: glm export {adapter} {adapter}-merged --base DIR",
        )
    if base is None:
        searched = ", ".join(map(str, look_in))
        raise UserError(
            f"{adapter} is an adapter of {name}, whose weights are in none of {searched}",
            f"prepare {name} first; or merge it elsewhere: glm export {adapter} {adapter}-merged --base DIR",
        )
    return base


def _model_folders(parent: Path) -> Iterator[Path]:
    """Folders with a manifest, also those of an organization; NAME and ORG/NAME."""
    for pattern in (MANIFEST_FILE, f"*/{MANIFEST_FILE}", f"*/*/{MANIFEST_FILE}"):
        yield from (manifest.parent for manifest in sorted(parent.glob(pattern)))


def _convert(folder: Path, target: Path, family: str | None) -> None:
    from entrypoints.checkpoint.adoption import adopt_native
    from entrypoints.checkpoint.conversion import convert_to_native, original_format

    logger.info("converting %s", folder)
    if _is_foreign_native(folder):
        adopt_native(folder, target, overwrite=True, requested=family)
        return
    convert_to_native(folder, target, original_format(folder, family), overwrite=True)


def _copy(folder: Path, target: Path) -> None:
    """Copy the model files of a native folder, without logs and states of a run, and verify the copy."""
    from entrypoints.checkpoint.native import model_files, open_native

    open_native(folder, quantized=True)
    has_manifest = (folder / MANIFEST_FILE).is_file()
    names = list(read_manifest(folder)["files"]) if has_manifest else [file.name for file in model_files(folder)]
    logger.info("copying %s", folder)
    with atomic_folder(target, overwrite=True) as partial:
        require_disk_space(partial, sum((folder / name).stat().st_size for name in names))
        for name in [*names, MANIFEST_FILE] if has_manifest else names:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, partial / name)
        if not has_manifest:
            write_manifest(partial, {"made_by": "glm prepare", "source": folder.name})
        check_manifest(partial, hashes=True)


def _download_and_convert(model: str, target: Path, store: Path, options: PrepareOptions) -> None:
    from entrypoints.hub.download import download

    folder = store / DOWNLOADS / model
    download(model, folder, options.source, None, options.settings)
    _convert(folder, target, options.family)
    shutil.rmtree(folder)
