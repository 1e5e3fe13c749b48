"""The result of a run in the output folder: the finished model, or the model of one of its checkpoints."""

import logging
import shutil
from pathlib import Path

from entrypoints.checkpoint.conversion import write_native_folder
from entrypoints.checkpoint.native import open_native
from entrypoints.file_writing import write_json
from entrypoints.training.checkpoints.folders import Checkpoint, best_checkpoint, list_checkpoints
from entrypoints.training.checkpoints.output_dir import ADAPTER_FILES, FinishedRun, result_files, write_finished
from entrypoints.training.checkpoints.store import PARTIAL
from entrypoints.training.output_files import RESULTS_FILE, STATE_FILE
from entrypoints.training.preparation import PreparedRun
from entrypoints.training.result.finalize import CheckpointFinalizer

logger = logging.getLogger(__name__)


def replace_result(output: Path, partial: Path) -> None:
    """Move a finalized model from `partial` into the output folder, file by file, the manifest last."""
    for old in result_files(output):
        old.unlink()
    for file in result_files(partial):
        file.rename(output / file.name)
    shutil.rmtree(partial.parent)


def find_best(run: PreparedRun) -> Checkpoint | None:
    """The checkpoint of the run in its output folder with the lowest loss on its validation rows."""
    rows = run.settings["validation_rows"]
    checkpoints = list_checkpoints(run.arguments.output_dir)
    return best_checkpoint(one for one in checkpoints if one.run_config.get("validation_rows") == rows)


def write_result_of(checkpoint: Checkpoint, run: PreparedRun) -> None:
    """Make the model of a checkpoint the result, in the dtype of the base model."""
    if checkpoint.eval_loss is not None:
        logger.info("the result is %s, validation loss %.4g", checkpoint.folder.name, checkpoint.eval_loss)
    finalizer = CheckpointFinalizer(run.base, run.prompt_format, run.arguments)
    output = run.arguments.output_dir
    partial = output / PARTIAL / "result"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if run.arguments.saves_adapter:
        for name in ADAPTER_FILES:
            if (checkpoint.folder / name).is_file():
                shutil.copyfile(checkpoint.folder / name, partial / name)
    else:
        saved = open_native(checkpoint.folder)
        write_native_folder(saved, saved.files, partial, str(finalizer.base_dtype).removeprefix("torch."))
    finalizer.finalize(partial, finalizer.base_dtype)
    replace_result(output, partial)


def complete_from_checkpoint(run: PreparedRun, checkpoint: Checkpoint) -> None:
    """Write the result of a run whose last step is in a checkpoint: it was stopped before it could write the result."""
    logger.info("%s has all %d steps: its model is the result", checkpoint.folder, checkpoint.step)
    run.take_output_dir()
    best = find_best(run) if run.arguments.load_best else None
    write_result_of(best or checkpoint, run)
    output = run.arguments.output_dir
    shutil.copyfile(checkpoint.folder / STATE_FILE, output / STATE_FILE)
    write_json(output / RESULTS_FILE, {"train_steps": checkpoint.step})


def mark_finished(run: PreparedRun) -> None:
    """Record that everything of the run is written."""
    step = run.last_step
    write_finished(run.arguments.output_dir, FinishedRun(step, run.position_at(step).as_dict(), run.settings))
