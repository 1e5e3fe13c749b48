"""Where `glm prepare` finds a model: a folder by its path, a folder by its name, or a hub's repository."""

import os
from collections.abc import Sequence
from pathlib import Path

from entrypoints.errors import UserError


def find_model(model: str, look_in: Sequence[Path]) -> tuple[str, Path | None]:
    """Name in the store and source folder, None for a hub's model. Raises UserError: it is neither."""
    if Path(model).is_dir() and Path(model).resolve().name:
        folder = Path(model).resolve()
        return folder.name, folder
    is_relative_name = not model.startswith("/") and not {".", ".."} & {*model.split("/")}
    for folder in look_in:
        try:
            if is_relative_name and (folder / model).is_dir():
                return model, (folder / model).resolve()
        except PermissionError as error:
            raise UserError(
                f"{folder} cannot be read ({error.strerror})", f"make it readable for {user_and_group()}"
            ) from error
    if is_relative_name and model.count("/") == 1:
        _check_hub_name(model)
        return model, None
    searched = "".join(f", nor is it in {folder}" for folder in look_in)
    raise UserError(f"model {model!r} not found: it is not a folder{searched}", "use demo, ORG/NAME, or a folder")


def _check_hub_name(model: str) -> None:
    """Raises UserError: not of the form ORG/NAME, or the path of a missing folder, as models/mine is."""
    from entrypoints.hub.download import KNOWN_MODELS, canonical_name

    parent, name = model.split("/")
    if canonical_name(model) not in KNOWN_MODELS and Path(parent).is_dir():
        raise UserError(
            f"model {model!r} not found: {parent} is a folder here, and has no {name}",
            "check the path; to download it from a hub, run the command in another folder",
        )


def user_and_group() -> str:
    """Who needs a permission: the images run with group 0."""
    return f"user {os.getuid()} or group {os.getgid()}"
