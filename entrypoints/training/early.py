"""Mistakes that show without torch, which takes seconds to import: files, columns, folders, the kind of model."""

import json

from entrypoints.checkpoint.layout import Shape
from entrypoints.dataset.reading import require_columns
from entrypoints.errors import UserError
from entrypoints.training import zero
from entrypoints.training.arguments import TrainArguments


def check(arguments: TrainArguments) -> None:
    """Raise UserError for what the user can mend; all of it is looked at again, and more closely, by `prepare`."""
    zero.configuration(arguments.deepspeed, arguments)
    _check_model(arguments)
    check_output(arguments)
    check_files(arguments)


def check_files(arguments: TrainArguments) -> None:
    """They are there, and their first rows have the columns."""
    validation = arguments.validation_file
    for file in (*arguments.train_files, *([validation] if validation else [])):
        if not file.exists():
            raise UserError(f"there is no file {file}", "check the path")
        if file != validation or not file.is_file() or file.stat().st_size:
            require_columns(file, arguments.encoding, arguments.columns)


def check_output(arguments: TrainArguments) -> None:
    """The folder for the result is empty, or may be written into."""
    folder = arguments.output_dir
    if folder.is_file():
        raise UserError(f"--output-dir {folder} is a file", "name a folder")
    may_hold = arguments.overwrite_output_dir or arguments.resume
    if folder.is_dir() and not may_hold and any(not file.name.startswith(".") for file in folder.iterdir()):
        raise UserError(
            f"--output-dir {folder} is not empty",
            "choose another folder, add --overwrite-output-dir, or go on with --resume auto",
        )


def _check_model(arguments: TrainArguments) -> None:
    folder = arguments.model_name_or_path
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder", "name the folder of a converted checkpoint (--model-name-or-path)")
    config = folder / "config.json"
    if config.is_file():
        try:
            shape = Shape.from_native(json.loads(config.read_text(encoding="utf-8")), config)
        except ValueError:  # damaged: `open_native` says how
            return
        check_layers(arguments, shape)


def check_layers(arguments: TrainArguments, shape: Shape) -> None:
    """The model has as many layers as are to be trained."""
    if arguments.method == "freeze" and arguments.freeze_layers > shape.layers:
        raise UserError(
            f"--freeze-layers {arguments.freeze_layers}: the model has {shape.layers} layers", "train fewer of them"
        )
