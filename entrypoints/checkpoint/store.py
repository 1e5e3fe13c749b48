"""The model store: a folder of converted checkpoints and GGUF files, each of which is whole or not there.

What is there already is checked against its hashes and left alone, so that filling a store again costs its reading.
A download that was interrupted goes on where it stopped; conversion and quantising start again.
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from entrypoints.checkpoint.adapters import is_adapter
from entrypoints.checkpoint.files import locked, require_space, written_beside
from entrypoints.checkpoint.manifest import (
    MANIFEST_FILE,
    check_manifest,
    check_record,
    read_manifest,
    read_record,
    record_of,
    sha256,
    write_manifest,
)
from entrypoints.checkpoint.original import read_json
from entrypoints.errors import UserError
from entrypoints.prompt import PromptFormat
from entrypoints.settings import Settings

logger = logging.getLogger(__name__)
DEMO = "demo"
DEMO_BYTES = 100_000_000  # what making the demo's model takes for a while
DOWNLOADS = ".downloads"  # in the store, since it must go on after a restart; removed once it is converted


def fill(
    store: Path,
    model: str,
    look_in: Sequence[Path],
    source: str,
    settings: Settings,
    make_demo: Callable[[Path], Path],
) -> Path:
    """Put a model into the store and return its folder; two processes at once do it once.

    model: "demo", a hub's ORG/NAME, a folder in either layout, or the name of a folder below one of `look_in`.
    make_demo: makes the demo's checkpoint somewhere in the empty folder it is given.
    Raises UserError when the model is not found, is damaged, or the store cannot be written.
    """
    name, folder = (DEMO, None) if model == DEMO else _find(model, [*look_in, store])
    target = store / name
    with _only_one(store, name):
        if target.is_dir():
            if not folder or not _changed(folder, target):
                _check(target)
                return target
            logger.info("%s has changed since it was copied", folder)
        if model == DEMO:
            with _scratch(store) as scratch:
                _copy(make_demo(scratch), target)
        elif folder:
            _take(folder, target)
        else:
            _fetch(model, target, store, source, settings)
    return target


def quantized(folder: Path, type_: str, make: Callable[[Path, Path, str, Callable[[Path], object]], object]) -> Path:
    """The GGUF file of a folder of a store, made if it is not there or the folder is another one by now.

    make: writes it, given folder, file, type, and what to call with the finished file before it gets its name.
    Its hash stands in a record beside it. Raises UserError when the file is damaged.
    """
    target = folder.with_name(f"{folder.name}-{type_}.gguf")
    record = record_of(target)
    made_from = sha256(folder / MANIFEST_FILE)
    with _only_one(folder.parent, target.name):
        if target.is_file():
            known = read_record(target)
            if known.get("made_from") == made_from:
                check_record(target)
                logger.info("%s is there, as it was made", target)
                return target
            logger.info("%s was made from other contents of %s", target, folder)
            target.unlink()

        def describe(finished: Path) -> None:
            fields = {"made_from": made_from, "size": finished.stat().st_size, "sha256": sha256(finished)}
            record.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

        logger.info("quantising %s", folder)
        make(folder, target, type_, describe)
    return target


def _find(model: str, look_in: Sequence[Path]) -> tuple[str, Path | None]:
    """Name in the store, and the folder that is meant, None for a hub's model; raises UserError when it is neither."""
    if Path(model).is_dir() and Path(model).resolve().name:
        folder = Path(model).resolve()
        return folder.name, folder
    inside = not model.startswith("/") and not {".", ".."} & {*model.split("/")}
    for folder in look_in:
        try:
            if inside and (folder / model).is_dir():
                return model, (folder / model).resolve()
        except PermissionError as error:
            raise UserError(f"{folder} cannot be read ({error.strerror})", f"let {_who()} read it") from error
    if inside and model.count("/") == 1:
        from entrypoints.checkpoint.hub import canonical

        canonical(model)  # raises when it cannot be a hub's
        return model, None
    places = "".join(f", nor one in {folder}" for folder in look_in)
    raise UserError(f"no model {model!r}: it is no folder{places}", f"give {DEMO}, ORG/NAME as on the hub, or a folder")


def _who() -> str:
    return f"user {os.getuid()} or group {os.getgid()}"


@contextlib.contextmanager
def _only_one(store: Path, name: str) -> Iterator[None]:
    try:
        with locked(store / f".{name.replace('/', '.')}.prepare.lock"):
            yield
    except OSError as error:
        raise UserError(
            f"cannot write in {store} ({error.strerror or error})",
            f"it needs free space and must be writable for {_who()}",
        ) from error


@contextlib.contextmanager
def _scratch(store: Path) -> Iterator[Path]:
    scratch = store / f".{DEMO}.scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    require_space(store, DEMO_BYTES)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _changed(folder: Path, target: Path) -> bool:
    """Was a native folder written anew, as a training run does, after the store got its copy?"""
    if not (folder / MANIFEST_FILE).is_file() or _is_original(folder):
        return False
    return read_manifest(folder)["files"] != read_manifest(target)["files"]


def _check(target: Path) -> None:
    try:
        count = check_manifest(target, hashes=True)
    except UserError as error:
        raise UserError(error.problem, f"remove {target} and run this again, which makes it anew") from error
    logger.info("%s is there: %d files as the manifest says", target, count)


def _is_original(folder: Path) -> bool:
    return read_json(folder / "config.json").get("model_type") == "chatglm"


def _take(folder: Path, target: Path) -> None:
    if is_adapter(folder):
        raise UserError(f"{folder} is an adapter, no whole model", "make one of it with its base: glm export")
    if _is_original(folder):
        from entrypoints.checkpoint.conversion import convert_to_native

        logger.info("converting %s", folder)
        convert_to_native(folder, target, PromptFormat(), overwrite=True)
    else:
        _copy(folder, target)


def _copy(folder: Path, target: Path) -> None:
    """Copy a native folder's model without logs and states of a run; what arrives must be what was described."""
    from entrypoints.checkpoint.native import model_files, open_native

    open_native(folder, quantised=True)
    described = (folder / MANIFEST_FILE).is_file()
    names = read_manifest(folder)["files"] if described else [file.name for file in model_files(folder)]
    logger.info("copying %s", folder)
    with written_beside(target, overwrite=True) as partial:
        require_space(partial, sum((folder / name).stat().st_size for name in names))
        for name in [*names, MANIFEST_FILE] if described else names:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, partial / name)
        if not described:
            write_manifest(partial, {"made_by": "glm prepare", "source": folder.name})
        check_manifest(partial, hashes=True)


def _fetch(model: str, target: Path, store: Path, source: str, settings: Settings) -> None:
    from entrypoints.checkpoint.conversion import convert_to_native
    from entrypoints.checkpoint.hub import download

    folder = store / DOWNLOADS / model
    download(model, folder, source, None, settings)
    logger.info("converting %s", folder)
    convert_to_native(folder, target, PromptFormat(), overwrite=True)
    shutil.rmtree(folder)
