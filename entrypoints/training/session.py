"""A complete fine-tuning: quick checks, memory estimate, preparation, training in one or more processes, result check.

Modules that import torch are imported after the quick checks, so that a mistake is reported at once.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from entrypoints import logs
from entrypoints.errors import UserError
from entrypoints.training import launch
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.checkpoints.run_status import RunStatus, StatusFile
from entrypoints.training.flags import STARTED_BY_GLM_FLAG
from entrypoints.training.methods import deepspeed_config
from entrypoints.training.output_files import RUN_LOG_FILE
from entrypoints.training.preflight import quick_checks

if TYPE_CHECKING:
    from entrypoints.training.launch import ProcessLayout
    from entrypoints.training.preparation import PreparedRun
    from entrypoints.training.run_context import RunContext

logger = logging.getLogger(__name__)


def fine_tune(arguments: TrainArguments, command_line: Sequence[str]) -> Path | None:
    """Train in this process or in those that it starts; returns the output folder, None on nodes other than the first.

    command_line: the flags of this run, with which it starts its workers. Raises UserError.
    """
    deepspeed = quick_checks.check_inputs(arguments)
    if launch.writes_output(os.environ):
        quick_checks.check_output_dir(arguments)
    run, layout = _open_run(arguments, deepspeed)
    _check_resources(run, layout)
    return _train_on_node(run, layout, command_line)


def dry_run(arguments: TrainArguments, command_line: Sequence[str]) -> str:
    """The memory estimate of the run with alternatives, its disk, and its torchrun command; nothing is written."""
    deepspeed = quick_checks.check_inputs(arguments)
    if launch.writes_output(os.environ):
        quick_checks.check_output_dir(arguments)
    run, layout = _open_run(arguments, deepspeed)
    from entrypoints.hardware.resources import available_memory
    from entrypoints.training.preflight import disk_check, memory_check
    from entrypoints.training.preflight.memory_estimate import MemoryPlan

    gpu_bytes = memory_check.min_free_gpu_memory(memory_check.visible_gpus(arguments))
    table = memory_check.format_table(MemoryPlan.of_run(run, layout), gpu_bytes, available_memory())
    flags = [flag for flag in command_line if flag != "--dry-run"]
    command = " ".join(["torchrun", *layout.torchrun_args(), "-m", "entrypoints", "train", *flags])
    return f"{table}\n{disk_check.DiskPlan.of_run(run)}\n{command}"


def join_as_worker(arguments: TrainArguments, started_by_glm: bool) -> Path | None:
    """Train as one worker of a launcher; returns the output folder in the worker that checked the result, else None.

    started_by_glm: `fine_tune` started the launcher; it has checked the inputs and checks the result.
    """
    launch.terminate_with_launcher()
    if os.environ.get("RANK", "0") != "0":
        logging.getLogger().setLevel(logging.ERROR)
    with launch.stdout_to_stderr():  # DeepSpeed prints to stdout
        try:
            if not started_by_glm:
                return _train_under_launcher(arguments)
            _train_started_by_glm(arguments)
        except UserError as error:
            if started_by_glm and launch.write_error_file(error, os.environ):
                raise SystemExit(1) from None
            raise
    return None


def _train_started_by_glm(arguments: TrainArguments) -> None:
    run, layout = _open_run(arguments, deepspeed_config.load_config(arguments))
    from entrypoints.training.preparation import prepare
    from entrypoints.training.run import train

    prepared = prepare(run, layout.world_size, writes_output=False, check_hashes=False)
    with _log_of_first_worker(arguments):
        train(prepared)


def _log_of_first_worker(arguments: TrainArguments) -> contextlib.AbstractContextManager[None]:
    """Add the log lines of the process that computes the shown losses to those of the launcher."""
    if not launch.writes_output(os.environ):
        return contextlib.nullcontext()
    return logs.copied_to(arguments.output_dir / RUN_LOG_FILE, append=True)


def _train_under_launcher(arguments: TrainArguments) -> Path | None:
    deepspeed = quick_checks.check_inputs(arguments)
    writes_output = launch.writes_output(os.environ)
    if writes_output:  # the others may find what this one has already written
        quick_checks.check_output_dir(arguments)
    run, layout = _open_run(arguments, deepspeed)
    _check_resources(run, layout)
    from entrypoints.training.preparation import prepare
    from entrypoints.training.run import train

    prepared = prepare(run, layout.world_size, writes_output)
    if not writes_output:
        if prepared.has_steps:
            train(prepared)
        return None
    return _complete(prepared, lambda: train(prepared))


def _train_on_node(run: "RunContext", layout: "ProcessLayout", command_line: Sequence[str]) -> Path | None:
    from entrypoints.training.preparation import prepare

    prepared = prepare(run, layout.world_size, layout.node_rank == 0)  # user errors show before a process starts
    prepared = _checkpointed_if_needed(prepared, layout)

    def train_node() -> None:
        """Train in this process, or in the workers of this node."""
        if layout.world_size == 1 and not run.deepspeed:  # DeepSpeed needs a launcher
            from entrypoints.training.run import train

            train(prepared)
            return
        # the checkpoint that this process has found and checked: workers could find another one
        resumed = ["--resume", str(prepared.resumed.folder)] if prepared.resumed else []
        switched_on = prepared.arguments.gradient_checkpointing and not run.arguments.gradient_checkpointing
        checkpointing = ["--gradient-checkpointing"] if switched_on else []
        launch.start_workers(layout, [*command_line, *resumed, *checkpointing, f"--{STARTED_BY_GLM_FLAG}"])

    if layout.node_rank == 0:
        return _complete(prepared, train_node)
    if prepared.has_steps:
        train_node()
    return None


def _checkpointed_if_needed(run: "PreparedRun", layout: "ProcessLayout") -> "PreparedRun":
    """The run with gradient checkpointing if its longest rows fit only so; on one node, where all workers get it."""
    from entrypoints.training.preflight import memory_check
    from entrypoints.training.preflight.memory_estimate import MemoryPlan
    from entrypoints.training.preparation import row_lengths

    plan = MemoryPlan.of_run(run, layout)
    longest = max(row_lengths(run.dataset)) + run.arguments.prefix_length
    plan = replace(plan, length=min(plan.length, longest))
    gpus = min(plan.nproc_per_node, memory_check.visible_gpus(run.arguments))
    gpu_bytes = memory_check.min_free_gpu_memory(gpus)
    if layout.nnodes > 1 or not memory_check.needs_checkpointing(plan, gpu_bytes):
        return run
    logger.info("the longest batch, of rows of %d tokens, fits with gradient checkpointing, which is on", plan.length)
    return replace(run, arguments=replace(run.arguments, gradient_checkpointing=True))


def _complete(run: "PreparedRun", train: Callable[[], object]) -> Path:
    """Train in the process that writes the output folder, check the result and mark the run as finished.

    A finished run stays as it is; a run that has all its steps in a checkpoint gets its result from there.
    """
    folder = run.arguments.output_dir
    if run.finished:
        return folder
    status = StatusFile(folder, RunStatus(run.first_step, run.last_step, _shown_settings(run)))
    with logs.copied_to(folder / RUN_LOG_FILE, append=run.resumed is not None), status.kept():
        _train_and_check(run, train, status)
    return folder


def _train_and_check(run: "PreparedRun", train: Callable[[], object], status: StatusFile) -> None:
    from entrypoints.training.result import checks, final_model

    arguments = run.arguments
    test_rows = checks.read_test_rows(arguments, checks.encoding_of_run(run))
    base_answers = checks.answer_with_base_model(arguments, test_rows)
    if run.resumed and not run.has_steps:
        final_model.complete_from_checkpoint(run, run.resumed)
    else:
        run.take_output_dir()
        status.enter_phase("training")
        train()
    status.enter_phase("checking")
    checks.check_result(arguments, test_rows, base_answers)
    final_model.mark_finished(run)


def _shown_settings(run: "PreparedRun") -> dict[str, object]:
    """The settings that the training page shows: the flags that are set, and what the run decided itself."""
    flags = {name: value for name, value in vars(run.arguments).items() if value is not None}
    decided = {name: value for name, value in run.settings.items() if not name.endswith("rows")}
    return {**flags, **decided}


def _open_run(
    arguments: TrainArguments, deepspeed: deepspeed_config.Config | None
) -> "tuple[RunContext, ProcessLayout]":
    from entrypoints.training.preflight import memory_check
    from entrypoints.training.run_context import open_run

    run = open_run(arguments, deepspeed)
    if launch.is_worker(os.environ):
        return run, launch.worker_layout(os.environ)
    return run, launch.plan_layout(arguments, os.environ, memory_check.visible_gpus(arguments))


def _check_resources(run: "RunContext", layout: "ProcessLayout") -> None:
    """Memory, and the disk that the run needs at least: how many rows it has is not known yet."""
    from entrypoints.training.checkpoints.folders import checkpoint_folders
    from entrypoints.training.preflight import disk_check, memory_check
    from entrypoints.training.preflight.memory_estimate import MemoryPlan

    memory_check.check_node(MemoryPlan.of_run(run, layout), os.environ)
    if launch.writes_output(os.environ) and not checkpoint_folders(run.arguments.output_dir):
        disk_check.check_disk(run, run.arguments.max_steps or 1)
