"""What needs torch but not the model's weights: base model, precision, encoded rows, and a clean output folder."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from entrypoints.checkpoint.manifest import check_base_weights
from entrypoints.errors import UserError
from entrypoints.training.checkpoints import resume_settings, store
from entrypoints.training.checkpoints.folders import Checkpoint
from entrypoints.training.checkpoints.output_dir import FinishedRun, prepare_output_dir, read_finished
from entrypoints.training.methods import deepspeed_config
from entrypoints.training.preflight import disk_check
from entrypoints.training.rows import encoded_rows
from entrypoints.training.rows.collation import RowEncoder
from entrypoints.training.rows.packing import PackedDataset, pack_rows
from entrypoints.training.rows.position import Position, StepPlan, read_position
from entrypoints.training.run_context import RunContext

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRun(RunContext):
    """A run that is ready to load its model; every process of it prepares the same one."""

    dataset: Dataset | PackedDataset
    validation: Dataset | None
    resumed: Checkpoint | None
    plan: StepPlan
    start: Position
    settings: dict[str, Any]  # recorded in its checkpoints
    finished: FinishedRun | None  # the run that the output folder holds already, if this one would add nothing to it

    @property
    def first_step(self) -> int:
        """The steps that were done before."""
        return self.resumed.step if self.resumed else 0

    @property
    def last_step(self) -> int:
        """The step at which the run ends."""
        return self.plan.last_step(self.arguments, self.start, self.first_step)

    @property
    def has_steps(self) -> bool:
        """Whether anything is left to train."""
        return not self.finished and self.last_step > self.first_step

    def position_at(self, step: int) -> Position:
        """The position in the rows after a step."""
        return self.plan.advance(self.start, step - self.first_step)

    def take_output_dir(self) -> None:
        """Remove or set aside what the output folder has of other runs; last of all, when no user error can follow."""
        prepare_output_dir(self.arguments.output_dir, self.resumed)


def prepare(run: RunContext, world_size: int = 1, writes_output: bool = True, check_hashes: bool = True) -> PreparedRun:
    """Encode the rows and find the checkpoint to resume from, or the finished run that has nothing left to do.

    writes_output: only one process of a run creates the output folder. check_hashes: compare the checkpoint
    with its hashes, which the launcher of a worker has done. Raises UserError: the output folder cannot be written, the
    checkpoint does not fit the run, rows that cannot be used or exceed the context length.
    """
    arguments = run.arguments
    finished = read_finished(arguments.output_dir) if arguments.resume == "auto" else None
    if writes_output and not finished:
        _create_output_dir(run)
    dataset, validation = _load_rows(run)
    plan = StepPlan.of_run(arguments, len(dataset), world_size)
    settings = _settings(run, dataset, validation, plan)
    resumed, start = None, plan.first_position()
    if finished and _has_more_steps(finished, settings, run, plan):
        finished = None
    if not finished:
        resumed = store.find_checkpoint(arguments.resume, arguments.output_dir, check_hashes)
    if resumed:
        _check_resumed(resumed, settings, run)
        start = read_position(resumed.position, plan, resumed.step)
    prepared = PreparedRun(
        arguments, run.base, run.precision, run.deepspeed, dataset, validation, resumed, plan, start, settings, finished
    )
    _check_last_step(prepared)
    if writes_output and prepared.has_steps:
        logger.info("disk: %s", disk_check.check_disk(run, prepared.last_step, resumed))
    return prepared


def _load_rows(run: RunContext) -> tuple[Dataset | PackedDataset, Dataset | None]:
    """The encoded training rows, packed if requested, and the validation rows."""
    arguments = run.arguments
    encoder = RowEncoder(
        run.base.tokenizer,
        run.prompt_format,
        arguments.max_source_length,
        arguments.max_target_length,
        pairs=arguments.objective == "dpo",
    )
    load_rows = encoded_rows.load_encoded_rows
    rows = load_rows(arguments.train_files, arguments, encoder, arguments.max_train_samples)
    rows = encoded_rows.mix_rows(rows, arguments, encoder)
    _check_context_length(rows, run)
    validation = None
    if arguments.validation_file and _has_rows(arguments.validation_file):
        validation = load_rows([arguments.validation_file], arguments, encoder)
    return _packed(rows, run) if arguments.packing else rows, validation


def row_lengths(dataset: Dataset | PackedDataset) -> list[int]:
    """Tokens of each row, or of each pack."""
    if isinstance(dataset, PackedDataset):
        return dataset.lengths
    lengths: list[int] = dataset["length"][:]
    return lengths


def _packed(rows: Dataset, run: RunContext) -> PackedDataset:
    longest = run.arguments.max_source_length + run.arguments.max_target_length + 1
    packs = pack_rows(rows, min(longest, run.base.model_config.context_length))
    logger.info("%d rows packed into %d", len(rows), len(packs))
    return packs


def _has_rows(validation_file: Path) -> bool:
    if validation_file.is_file() and validation_file.stat().st_size == 0:
        logger.warning("%s is empty: no evaluation during training", validation_file)
        return False
    return True


def _check_context_length(rows: Dataset, run: RunContext) -> None:
    context_length, prefix = run.base.model_config.context_length, run.arguments.prefix_length
    longest = max(rows["length"])
    if longest > context_length - prefix:
        used = f", of which the prefix takes {prefix}" if prefix else ""
        raise UserError(
            f"the longest row has {longest} tokens, the context length of the model is {context_length}{used}",
            "lower --max-source-length or --max-target-length",
        )


def _create_output_dir(run: RunContext) -> None:
    folder = run.arguments.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create --output-dir {folder} ({error.strerror})", "choose another folder") from error


def _settings(
    run: RunContext, dataset: Dataset | PackedDataset, validation: Dataset | None, plan: StepPlan
) -> dict[str, Any]:
    """The settings that checkpoints record and that a resumed run is compared with."""
    decided = {
        "template": run.prompt_format.template,
        "source_prefix": run.prompt_format.source_prefix,
        "precision": str(run.precision.compute_dtype).removeprefix("torch."),
        "processes": plan.processes,
        "rows_per_step": plan.rows_per_step,
        "rows": resume_settings.rows_fingerprint(dataset),
        "validation_rows": resume_settings.rows_fingerprint(validation) if validation else None,
    }
    return resume_settings.describe(run.arguments, decided, run.deepspeed)


def _has_more_steps(finished: FinishedRun, settings: dict[str, Any], run: RunContext, plan: StepPlan) -> bool:
    """Whether the run goes beyond the finished one in its output folder, with the same rows and method."""
    folder = run.arguments.output_dir
    resume_settings.check_same(finished.run_config, settings, folder)
    position = read_position(finished.position, plan, finished.step)
    last_step = plan.last_step(run.arguments, position, finished.step)
    if last_step <= finished.step:
        logger.info("the run in %s is finished: it has %d steps", folder, finished.step)
        return False
    logger.info("the run in %s is finished at step %d and continues to step %d", folder, finished.step, last_step)
    return True


def _check_resumed(resumed: Checkpoint, settings: dict[str, Any], run: RunContext) -> None:
    resume_settings.check_same(resumed.run_config, settings, resumed.folder)
    check_base_weights(resumed.folder, run.arguments.model_name_or_path)
    resume_settings.log_changes(resumed.run_config, settings)
    if run.deepspeed and resumed.run_config["processes"] != settings["processes"]:
        deepspeed_config.convert_to_universal(run.deepspeed, resumed.folder)


def _check_last_step(run: PreparedRun) -> None:
    if run.resumed and run.last_step < run.first_step:
        raise UserError(
            f"{run.resumed.folder} has {run.first_step} steps, but the run ends at step {run.last_step}",
            "raise --max-steps or --num-train-epochs, or name an earlier checkpoint: --resume DIR",
        )
