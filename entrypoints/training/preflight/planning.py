"""--dry-run with --gpu-memory: memory and disk of a run for GPUs that this machine need not have.

The model may be a name or a folder with only config.json, and data and output folder need not be given.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from entrypoints.errors import UserError
from entrypoints.hardware.cards import Card
from entrypoints.hardware.placement import weight_bytes
from entrypoints.hub.model_dimensions import read_dimensions
from entrypoints.training import launch
from entrypoints.training.arguments import TrainArguments
from entrypoints.training.methods.deepspeed_config import read_config
from entrypoints.training.methods.precision import Precision
from entrypoints.training.preflight import memory_check, quick_checks
from entrypoints.training.preflight.disk_check import DiskPlan
from entrypoints.training.preflight.memory_estimate import MemoryPlan

PLANNING_FLAGS = ("--dry-run", "--gpu-memory")  # the second one has a value


def plan_run(arguments: TrainArguments, card: Card, env: Mapping[str, str], command_line: Sequence[str]) -> str:
    """The memory table on such GPUs, one for each process, the smallest change that fits, disk and torchrun command.

    Raises UserError: neither a folder with config.json nor a published model, training rows that cannot be used.
    """
    if arguments.train_files:
        quick_checks.check_data_files(arguments)
    layout = launch.plan_layout(arguments, env, arguments.num_gpus or 1)
    plan = plan_memory(arguments, card).with_longest_rows(layout)
    table = memory_check.format_table(plan, card.memory, math.inf)
    missing = [] if arguments.train_files else ["--train-file FILE"]
    flags = _without_planning_flags(command_line)
    if not any(flag.partition("=")[0] == "--output-dir" for flag in flags):
        missing.append("--output-dir DIR")
    command = " ".join(["torchrun", *layout.torchrun_args(), "-m", "entrypoints", "train", *flags, *missing])
    return f"{table}\n{_advice(plan, card)}\n{plan_disk(plan)}\n{command}"


def plan_memory(arguments: TrainArguments, card: Card) -> MemoryPlan:
    """One process of a run on this card."""
    model_config = read_dimensions(arguments.model_name_or_path)
    if arguments.method == "freeze" and arguments.freeze_layers > model_config.num_layers:
        raise UserError(
            f"--freeze-layers {arguments.freeze_layers}: the model has {model_config.num_layers} layers",
            "train fewer of them",
        )
    bf16 = card.has_bf16 and not arguments.fp16 if arguments.bf16 is None else arguments.bf16
    dtype = Precision(arguments.fp16, bf16, use_cpu=False).compute_dtype
    deepspeed = read_config(arguments.deepspeed) if arguments.deepspeed else None
    return MemoryPlan(arguments, model_config, dtype, 0, deepspeed)


def plan_disk(plan: MemoryPlan) -> DiskPlan:
    """What the run writes; published weights have 16 bits."""
    weights = Path(plan.arguments.model_name_or_path).glob("*.safetensors")
    base_bytes = sum(file.stat().st_size for file in weights) or weight_bytes(plan.model_config, 2)
    return DiskPlan(plan.arguments, plan.model_config, plan.compute_dtype, plan.deepspeed, base_bytes)


def _advice(plan: MemoryPlan, card: Card) -> str:
    if plan.estimate().fits(card.memory, math.inf):
        return f"fits on {card}"
    for flags, other in memory_check.list_alternatives(plan, card.memory):
        if other.estimate().fits(card.memory, math.inf):
            return f"does not fit on {card}; {flags} would fit"
    return f"does not fit on {card}; use more or larger GPUs"


def _without_planning_flags(command_line: Sequence[str]) -> list[str]:
    dry_run, gpu_memory = PLANNING_FLAGS
    words = list(command_line)
    if gpu_memory in words:
        position = words.index(gpu_memory)
        del words[position : position + 2]
    return [word for word in words if word != dry_run and not word.startswith(f"{gpu_memory}=")]
