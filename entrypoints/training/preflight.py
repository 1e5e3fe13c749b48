"""What a run needs of each GPU and of the host, before anything is loaded: by method, ZeRO, batch and length.

States (weights, gradients, optimizer) are arithmetic: bytes a number times numbers, divided as ZeRO divides them.
Activations count what autograd keeps of each operation of the model; the fused attention keeps no matrix of scores.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from entrypoints.checkpoint.layout import Shape
from entrypoints.checkpoint.native import open_native
from entrypoints.engines.machine import available_memory
from entrypoints.engines.placement import weight_bytes
from entrypoints.errors import UserError
from entrypoints.training import launch, methods, zero
from entrypoints.training.arguments import PRESETS, TrainArguments, as_flag
from entrypoints.training.launch import Layout
from entrypoints.training.preparation import compute_dtype, precision

logger = logging.getLogger(__name__)
CONTEXT = 1.0e9  # bytes that CUDA, its libraries and the allocator's gaps take of each GPU
PROCESS = 3.0e9  # bytes of host memory of a process with torch in it
ADAM = 8  # bytes of state for each number that learns: two moments in float32
COPY = 4  # DeepSpeed's own float32 of it
FOUR_BIT = 0.516  # bytes of a number in nf4 with its doubly quantised scales
USUAL = {field.name: field.default for field in fields(TrainArguments)}
SHARED_MEMORY = 64 << 20  # what a container gets if nobody asks for more; NCCL needs more with several processes


@dataclass(frozen=True)
class Need:
    """Bytes: of one process, on its GPU if it has one; what is offloaded, of one machine's host memory."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loaded: float  # the model as it is read, in host memory until a GPU has it
    offloaded: float  # of all processes of the machine
    per_node: int

    @property
    def states(self) -> float:
        """What a process holds whatever the batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """Of one GPU."""
        return self.states + self.activations + CONTEXT

    @property
    def host(self) -> float:
        """Of one machine whose processes have GPUs."""
        return self.per_node * (PROCESS + self.loaded) + self.offloaded

    def host_memory(self, gpu: float | None) -> float:
        """Of one machine; without a GPU all lies there: the model as it is read, then what a run makes of it."""
        if gpu is not None:
            return self.host
        running = self.offloaded + self.per_node * (self.states + self.activations)
        return self.per_node * PROCESS + max(self.per_node * self.loaded, running)


@dataclass(frozen=True)
class Plan:
    """A run to judge: its flags, the model, the processes, and the longest row."""

    arguments: TrainArguments
    shape: Shape
    compute: torch.dtype
    length: int
    processes: int = 1
    per_node: int = 1

    def need(self) -> Need:
        """What it takes."""
        arguments, config = self.arguments, zero.read(self.arguments.deepspeed)
        total = weight_bytes(self.shape, 1)
        learning, width = methods.trainable(arguments, self.shape, total), self.compute.itemsize
        gradients, optimizer = 4 * learning, ADAM * learning
        weights = self._loaded(total, learning)
        if config:
            gradients, optimizer, weights = width * learning, (ADAM + COPY) * learning, width * total
        elif width < 4:
            weights += width * learning  # the 16-bit copies that autocast makes of what learns
        stage = zero.stage(config)
        shares = [self.processes if stage >= least else 1 for least in (3, 2, 1)]
        weights, gradients, optimizer = weights / shares[0], gradients / shares[1], optimizer / shares[2]
        offloaded = 0
        if zero.offloads(config, "optimizer"):
            offloaded += self.per_node * (optimizer + 4 * learning / shares[1])
            gradients = optimizer = 0
        if zero.offloads(config, "param"):
            offloaded += self.per_node * weights
            weights = 2 * width * (total - 2 * self.shape.vocabulary * self.shape.hidden) / self.shape.layers
        loaded = self._loaded(total, learning)
        return Need(weights, gradients, optimizer, self._activations(), loaded, offloaded, self.per_node)

    def _loaded(self, total: int, learning: int) -> float:
        width, bits = self.compute.itemsize, self.arguments.base_bits
        ends = 2 * self.shape.vocabulary * self.shape.hidden  # embedding and output layer are never quantised
        if bits:
            return width * ends + (FOUR_BIT if bits == 4 else 1) * (total - ends) + 4 * learning
        if self.arguments.method == "full" or self.arguments.deepspeed:
            return (4 if not self.arguments.deepspeed else width) * total
        return width * total + (4 if self.arguments.makes_adapter else 4 - width) * learning

    def _activations(self) -> float:
        tokens = self.arguments.per_device_train_batch_size * self.length
        width, shape = self.compute.itemsize, self.shape
        layers = self.arguments.freeze_layers if self.arguments.method == "freeze" else shape.layers
        layer = layer_bytes(shape, width, self.arguments)
        kept = layers * width * shape.hidden + layer if self.arguments.gradient_checkpointing else layers * layer
        scores = shape.vocabulary * (4 if width == 4 else width + 4)  # in float32, and in 16 bits before and after
        return tokens * (kept + 8 * shape.hidden) + self._labels() * scores

    def _labels(self) -> int:
        """Most of a batch; where rows have one answer, not more than that is long and its end."""
        arguments = self.arguments
        several = arguments.packing or arguments.columns.history or arguments.columns.conversations
        answer = self.length if several else min(self.length, arguments.max_target_length + 1)
        return arguments.per_device_train_batch_size * answer


def plan(arguments: TrainArguments, layout: Layout) -> Plan:
    """The run that flags and processes make, on the base model that is named, with rows as long as they may be."""
    shape = open_native(arguments.model_name_or_path).shape
    longest = arguments.max_source_length + arguments.max_target_length + 1 + arguments.prefix_length
    compute = compute_dtype(precision(arguments))
    return Plan(arguments, shape, compute, min(longest, shape.window), layout.processes, layout.per_node)


def layer_bytes(shape: Shape, width: int, arguments: TrainArguments) -> float:
    """Bytes that autograd keeps of one layer for each token; `width` is that of the numbers it computes with."""
    hidden, heads, ffn = shape.hidden, shape.heads * shape.head_dim, shape.ffn
    learns = not arguments.makes_adapter
    norms = 2 * (4 * hidden + (2 * width * hidden if learns else 0))
    attention = 4 * width * heads  # queries, keys and values of every head, and what comes out
    mlp = width * ffn * (4 if learns else 3)
    if arguments.method in ("lora", "qlora"):
        copies = 3 if arguments.lora_target == "attention" else 5
        dropped = (4 + 1) * hidden if arguments.lora_dropout else 4 * hidden
        wide = (5 + 2 * width) * ffn if copies == 5 else 0  # before the down projection, and beside the two LoRAs
        return norms + attention + mlp + copies * dropped + wide
    return norms + attention + mlp


def candidates(plan: Plan, gpu: float | None) -> list[tuple[str, Plan]]:
    """The run as it is told, then what a user could change, least change first; each with the flags that say so.

    Without a GPU (`gpu` is None) nothing is gained by offloading, and there is no qlora.
    """
    arguments = plan.arguments
    checkpointing = {"gradient_checkpointing": True} if arguments.method != "ptuning" else {}
    changes = [checkpointing]
    if arguments.per_device_train_batch_size > 1:
        changes.append({"per_device_train_batch_size": 1, **checkpointing})
    if not arguments.base_bits:
        moving = [preset for preset in PRESETS if gpu is not None or "offload" not in preset]
        helping = [preset for preset in moving if plan.processes > 1 or "offload" in preset]
        changes += [{"deepspeed": preset, **checkpointing} for preset in helping if preset != arguments.deepspeed]
    if not arguments.makes_adapter:
        changes.append({"method": "lora", "freeze_layers": USUAL["freeze_layers"]})
        if gpu is not None:
            changes.append({**changes[-1], "method": "qlora", **checkpointing, "deepspeed": None})
    found = {"as told": plan}
    for change in changes:
        differs = {name: value for name, value in change.items() if getattr(arguments, name) != value}
        if differs:
            found[_words(differs)] = replace(plan, arguments=replace(arguments, **differs))
    return list(found.items())


def _words(changes: dict) -> str:
    """Flags to add, and those to leave out, that make these changes."""
    added = {name: value for name, value in changes.items() if value != USUAL[name]}
    words = " ".join(as_flag(name) if value is True else f"{as_flag(name)} {value}" for name, value in added.items())
    left_out = [as_flag(name) for name in changes if name not in added]
    return f"{words} without {' and '.join(left_out)}" if left_out else words


def table(plan: Plan, gpu: float | None, host: float) -> str:
    """The candidates in GB, and whether each fits a GPU with `gpu` free bytes (None: the CPU does it all) and the host.

    The first row is the run as told.
    """
    head = ("", "weights", "gradients", "optimizer", "activations", "GPU", "host", "fits")
    lines = [head]
    for words, candidate in candidates(plan, gpu):
        need = candidate.need()
        parts = [f"{part / 1e9:.1f}" for part in (need.weights, need.gradients, need.optimizer, need.activations)]
        parts += ["-" if gpu is None else f"{need.total / 1e9:.1f}", f"{need.host_memory(gpu) / 1e9:.1f}"]
        lines.append((words, *parts, "yes" if fits(need, gpu, host) else "no"))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    rows = ("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)
    beside = f"{gpu / 1e9:.1f} GB free on each GPU" if gpu is not None else "no GPU: all of it is host memory"
    return "\n".join([f"GB for each of {plan.processes} processes; {beside}, {host / 1e9:.1f} GB on the host", *rows])


def fits(need: Need, gpu: float | None, host: float) -> bool:
    """Is there room, on each GPU and on the host?"""
    return (gpu is None or need.total <= gpu) and need.host_memory(gpu) <= host


def refuse_hopeless(plan: Plan, gpu: float | None, host: float) -> None:
    """Raise UserError when not even the states fit, which need no estimate, naming where and what would fit."""
    need = plan.need()
    sides = [("each GPU", need.states, gpu), ("the host", need.offloaded, host)]
    if gpu is None:
        sides = [("the host", need.per_node * need.states + need.offloaded, host)]
    for place, needed, room in sides:
        if needed > room:
            others = candidates(plan, gpu)[1:]
            helps = next((words for words, candidate in others if fits(candidate.need(), gpu, host)), None)
            more = "use a machine with more memory" if place == "the host" else "use more or larger GPUs"
            raise UserError(
                f"weights, gradients and optimizer need {needed / 1e9:.1f} GB of {place}, {room / 1e9:.1f} GB are free",
                f"{helps} would fit; --dry-run shows the table" if helps else f"{more}; --dry-run shows why",
            )


def check(arguments: TrainArguments, layout: Layout, gpus: int | None = None) -> None:
    """Log what the run needs of this machine, of whose GPUs the first `gpus` are looked at (None: those it takes).

    Raises UserError for what cannot work here: shared memory or memory that is too small.
    """
    refuse_small_shared_memory(layout.per_node)
    taken = min(layout.per_node, usable_gpus(arguments))
    gpu = free_of_each_gpu(taken if gpus is None else min(gpus, taken))
    judged = plan(arguments, layout)
    refuse_hopeless(judged, gpu, available_memory())
    need = judged.need()
    logger.info(
        "memory: %.1f GB for each process, %.1f of them for the longest batch; %.1f GB of the host (--dry-run: table)",
        need.total / 1e9, need.activations / 1e9, need.host_memory(gpu) / 1e9,
    )  # fmt: skip


def check_joined(arguments: TrainArguments, env: Mapping[str, str]) -> None:
    """`check` in a process that a launcher started: the first of each machine, before the others can go on.

    It looks at its own GPU alone: to look at one takes some of its memory for good.
    """
    if env["LOCAL_RANK"] == "0":
        check(arguments, launch.joined(env), gpus=1)


def refuse_small_shared_memory(per_node: int, folder: Path = Path("/dev/shm")) -> None:
    """Raise UserError for a container's default of 64 MB with several processes: NCCL ends there with a bus error."""
    if per_node > 1 and folder.is_dir() and (size := shutil.disk_usage(folder).total) <= SHARED_MEMORY:
        raise UserError(
            f"{folder} has {size >> 20} MB, and {per_node} processes pass their numbers through it",
            "start the container with --shm-size 8g, or mount an emptyDir of medium Memory there",
        )


def usable_gpus(arguments: TrainArguments) -> int:
    """GPUs of this machine that the run may take."""
    return torch.cuda.device_count() if arguments.device in ("auto", "cuda") else 0


def free_of_each_gpu(count: int) -> float | None:
    """Free bytes of the fullest of the first GPUs; None without one."""
    numbers = range(min(count, torch.cuda.device_count()))
    return min((torch.cuda.mem_get_info(number)[0] for number in numbers), default=None)
