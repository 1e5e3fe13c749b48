"""Whether a run fits into this machine, the table of --dry-run, and the flags that would make it fit."""

import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from entrypoints.errors import UserError
from entrypoints.hardware.gpus import list_gpus
from entrypoints.hardware.resources import available_memory
from entrypoints.sizes import format_size
from entrypoints.training.arguments import PRESETS, TrainArguments, flag_name
from entrypoints.training.launch import is_worker
from entrypoints.training.preflight.memory_estimate import MemoryPlan

logger = logging.getLogger(__name__)
DEFAULTS = {field.name: field.default for field in fields(TrainArguments)}
DEFAULT_SHM_BYTES = 64 << 20  # /dev/shm of a container by default; NCCL needs more for several processes
CURRENT = "as given"  # name of the first row of the table


def check_node(plan: MemoryPlan, env: Mapping[str, str]) -> None:
    """Check shared memory and memory of this node, and log the estimate.

    Of the workers of a node, the first one looks at all GPUs. Raises UserError if the model states do not fit.
    """
    check_shared_memory(plan.nproc_per_node)
    if is_worker(env) and env["LOCAL_RANK"] != "0":
        return
    gpu_bytes = min_free_gpu_memory(min(plan.nproc_per_node, visible_gpus(plan.arguments)))
    check_states_fit(plan, gpu_bytes, available_memory())
    need = plan.estimate()
    logger.info(
        "memory estimate: %s per process, of it %s for the longest batch; %s of host memory (table: --dry-run)",
        *map(format_size, (need.gpu, need.activations, need.host(gpu_bytes is not None))),
    )
    decides_later = plan.world_size == plan.nproc_per_node and not is_worker(env)
    if not (decides_later and needs_checkpointing(plan, gpu_bytes)):  # switched on if a row is that long
        warn_of_long_batches(plan, gpu_bytes)


def warn_of_long_batches(plan: MemoryPlan, gpu_bytes: float | None) -> None:
    """Log the flags that make the longest batch fit, if it does not: its states do, and rows are often shorter.

    gpu_bytes: free on each GPU; None: no GPU, whose memory would be the limit.
    """
    need = plan.estimate()
    if gpu_bytes is None or need.gpu <= gpu_bytes:
        return
    changes = list_alternatives(plan, gpu_bytes)
    flags = next((flags for flags, other in changes if other.estimate().gpu <= gpu_bytes), "a GPU with more memory")
    logger.warning(
        "a batch of rows of %d tokens needs %s of each GPU, %s are free; if memory runs out, use %s",
        plan.length, format_size(need.gpu), format_size(gpu_bytes), flags,
    )  # fmt: skip


def needs_checkpointing(plan: MemoryPlan, gpu_bytes: float | None) -> bool:
    """Whether the longest batch fits into each GPU with gradient checkpointing only.

    gpu_bytes: free on each GPU; None: no GPU, whose memory would be the limit.
    """
    arguments = plan.arguments
    if gpu_bytes is None or arguments.gradient_checkpointing or arguments.method == "ptuning":
        return False
    checkpointed = plan.with_arguments(replace(arguments, gradient_checkpointing=True))
    return checkpointed.estimate().gpu <= gpu_bytes < plan.estimate().gpu


def check_states_fit(plan: MemoryPlan, gpu_bytes: float | None, host_bytes: float) -> None:
    """Raise UserError when weights, gradients and optimizer states do not fit, with the flags that would help.

    gpu_bytes: free on each GPU; None: no GPU.
    """
    need = plan.estimate()
    if gpu_bytes is None:
        limits = [("the host", need.nproc_per_node * need.states + need.offloaded, host_bytes)]
    else:
        limits = [("each GPU", need.states + need.step, gpu_bytes), ("the host", need.host(True), host_bytes)]
    for place, needed, free in limits:
        if needed > free:
            alternatives = list_alternatives(plan, gpu_bytes)
            flags = next((flags for flags, other in alternatives if other.estimate().fits(gpu_bytes, host_bytes)), None)
            hardware = (
                "use more memory (with Compose: TRAIN_MEMORY)" if place == "the host" else "use more or larger GPUs"
            )
            raise UserError(
                f"weights, gradients and optimizer need {format_size(needed)} of {place}, {format_size(free)} are free",
                f"{flags} would fit; --dry-run prints the table"
                if flags
                else f"{hardware}; --dry-run prints the table",
            )


def list_alternatives(plan: MemoryPlan, gpu_bytes: float | None) -> list[tuple[str, MemoryPlan]]:
    """Changed runs that need less memory, smallest change first, each with the flags to change.

    Without a GPU (`gpu_bytes` is None) offloading gains nothing, and qlora is not available. A GPU that has no bfloat16
    computes in float32 unless --fp16 is given.
    """
    arguments = plan.arguments
    checkpointing: dict[str, Any] = {"gradient_checkpointing": True} if arguments.method != "ptuning" else {}
    changes = [checkpointing]
    if gpu_bytes is not None and plan.compute_dtype == torch.float32:
        checkpointing = {"fp16": True, **checkpointing}
        changes.append(checkpointing)
    if arguments.per_device_train_batch_size > 1:
        changes.append({"per_device_train_batch_size": 1, **checkpointing})
    if not arguments.quantized_bits:
        presets = [preset for preset in PRESETS if gpu_bytes is not None or "offload" not in preset]
        presets = [preset for preset in presets if plan.world_size > 1 or "offload" in preset]
        changes += [{"deepspeed": preset, **checkpointing} for preset in presets if preset != arguments.deepspeed]
    if not arguments.saves_adapter:
        changes.append({"method": "lora", "freeze_layers": DEFAULTS["freeze_layers"]})
        if gpu_bytes is not None:
            changes.append({**changes[-1], "method": "qlora", **checkpointing, "deepspeed": None})
    elif arguments.method == "lora" and gpu_bytes is not None and not arguments.quantized_bits:
        changes.append({"method": "qlora", **checkpointing, "deepspeed": None})
    found = {}
    for change in changes:
        changed = {name: value for name, value in change.items() if getattr(arguments, name) != value}
        if changed:
            found[_format_flags(changed)] = plan.with_arguments(replace(arguments, **changed))
    return list(found.items())


def _format_flags(changes: Mapping[str, Any]) -> str:
    """The flags to add and those to omit."""
    added = {name: value for name, value in changes.items() if value != DEFAULTS[name]}
    flags = " ".join(
        flag_name(name) if value is True else f"{flag_name(name)} {value}" for name, value in added.items()
    )
    omitted = [flag_name(name) for name in changes if name not in added]
    return f"{flags} without {' and '.join(omitted)}" if omitted else flags


def format_table(plan: MemoryPlan, gpu_bytes: float | None, host_bytes: float) -> str:
    """The memory of the run and of its alternatives for each process, and whether they fit.

    gpu_bytes: free on each GPU, None: no GPU. host_bytes: free on the host, infinite: not known.
    """
    head: tuple[str, ...] = ("", "weights", "gradients", "optimizer", "activations", "GPU", "host", "fits")
    lines = [head]
    for flags, candidate in [(CURRENT, plan), *list_alternatives(plan, gpu_bytes)]:
        need = candidate.estimate()
        parts = (need.weights, need.gradients, need.optimizer, need.activations)
        cells = [format_size(part) if part else "0" for part in parts]
        cells += ["-" if gpu_bytes is None else format_size(need.gpu), format_size(need.host(gpu_bytes is not None))]
        lines.append((flags, *cells, "yes" if need.fits(gpu_bytes, host_bytes) else "no"))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    rows = ("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)
    gpu = "no GPU: host memory only" if gpu_bytes is None else f"{format_size(gpu_bytes)} free on each GPU"
    host = "host memory is not checked" if host_bytes == math.inf else f"{format_size(host_bytes)} free on the host"
    processes = f"each of {plan.world_size} processes" if plan.world_size > 1 else "one process"
    title = f"{processes}; {gpu}, {host}"
    return "\n".join([title, *rows])


def check_shared_memory(nproc_per_node: int, folder: Path = Path("/dev/shm")) -> None:
    """Raise UserError for a container's default of 64 MB with several processes: NCCL fails with a bus error."""
    if nproc_per_node > 1 and folder.is_dir() and (size := shutil.disk_usage(folder).total) <= DEFAULT_SHM_BYTES:
        raise UserError(
            f"{folder} has {size >> 20} MB, and {nproc_per_node} processes exchange data through it",
            "start the container with --shm-size 8g, or mount an emptyDir with medium Memory there",
        )


def visible_gpus(arguments: TrainArguments) -> int:
    """GPUs of this node that the run may use."""
    return torch.cuda.device_count() if arguments.device in ("auto", "cuda") else 0


def min_free_gpu_memory(count: int) -> float | None:
    """Free bytes of the fullest of the first `count` GPUs; None without one."""
    return min((gpu.free for gpu in list_gpus()[:count]), default=None)
