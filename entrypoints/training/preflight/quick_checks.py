"""Checks of files, folders and flags that do not need torch, whose import takes seconds.

Each fact is checked here and nowhere else; preparation.py and memory_estimate.py check what needs torch.
"""

from collections.abc import Iterator
from pathlib import Path

from entrypoints.checkpoint.layout import ModelConfig
from entrypoints.dataset.reader import check_rows
from entrypoints.engines.packages import require_packages
from entrypoints.errors import UserError
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.checkpoints.folders import INCOMPLETE_REMEDY, find_problem
from entrypoints.training.methods import deepspeed_config
from entrypoints.training.output_files import RUN_LOG_FILE, RUN_STATUS_FILE
from entrypoints.untrusted import read_json_file


def check_inputs(arguments: TrainArguments) -> deepspeed_config.Config | None:
    """Check what the run reads: DeepSpeed configuration, training and validation files, test file, base model.

    Data comes first: it is the user's own, and its mistakes take longest to fix.
    Returns the DeepSpeed configuration, so that nobody parses it again. Raises UserError for the first problem.
    """
    if not arguments.train_files:
        raise UserError("no training rows are given", "add --train-file FILE")
    if arguments.quantized_bits:
        require_packages("bitsandbytes")
    config = deepspeed_config.load_config(arguments)
    check_data_files(arguments)
    _check_base_model(arguments)
    if arguments.resume not in (None, "auto") and (problem := find_problem(Path(arguments.resume))):
        raise UserError(f"--resume {arguments.resume}: {problem}", INCOMPLETE_REMEDY)
    return config


def check_data_files(arguments: TrainArguments) -> None:
    """Check training, validation and test files. Raises UserError for the first problem."""
    for file in _data_files(arguments):
        if file != arguments.validation_file or not file.is_file() or file.stat().st_size:
            check_rows(file, arguments.encoding, arguments.columns_of(file), arguments.max_skipped)


def check_output_dir(arguments: TrainArguments) -> None:
    """The output folder is empty, or may be overwritten; only for the process that writes it, before it does.

    Log and status of a run that ended before its first step do not count.
    """
    folder = arguments.output_dir
    if folder.is_file():
        raise UserError(f"--output-dir {folder} is a file", "name a folder")
    may_hold_files = arguments.overwrite_output_dir or arguments.resume
    if folder.is_dir() and not may_hold_files and any(_counts(file) for file in folder.iterdir()):
        raise UserError(
            f"--output-dir {folder} is not empty",
            "choose another folder, add --overwrite-output-dir, or continue with --resume auto",
        )


def _counts(file: Path) -> bool:
    return not file.name.startswith(".") and file.name not in (RUN_STATUS_FILE, RUN_LOG_FILE)


def _data_files(arguments: TrainArguments) -> Iterator[Path]:
    yield from arguments.train_files
    for file in (arguments.mix_file, arguments.validation_file, arguments.test_file):
        if file is not None:
            yield file


def _check_base_model(arguments: TrainArguments) -> None:
    """The folder holds a converted model with as many layers as are to be trained; `open_native` checks its tensors."""
    folder = arguments.model_name_or_path
    if not folder.is_dir():
        remedy = (
            "name the folder of a converted checkpoint (--model-name-or-path); to plan without it, add --dry-run "
            "--gpu-memory GB"
        )
        raise UserError(f"folder not found: {folder}", remedy)
    config = folder / "config.json"
    if not config.is_file():
        return
    try:
        model_config = ModelConfig.from_native(dict(read_json_file(config)), config)
    except ValueError:  # damaged: `open_native` reports how
        return
    if arguments.method == "freeze" and arguments.freeze_layers > model_config.num_layers:
        raise UserError(
            f"--freeze-layers {arguments.freeze_layers}: the model has {model_config.num_layers} layers",
            "train fewer of them",
        )
