"""From one command to the processes of a run: torchrun on one node, or on each of several nodes.

A process that torchrun or the deepspeed launcher started (LOCAL_RANK is set) is a worker of the run. Any other process
starts torchrun itself when the run has more than one process: on one node with a port that torchrun chooses, on
several nodes at the address that Kubernetes or the user sets.
"""

import contextlib
import ctypes
import gc
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from entrypoints.errors import UserError
from entrypoints.hardware.resources import available_cpus
from entrypoints.training.arguments import TrainArguments

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

logger = logging.getLogger(__name__)
DEFAULT_MASTER_PORT = "29500"  # of several nodes, if MASTER_PORT is not set
SHUTDOWN_SECONDS = 1800  # a checkpoint of the full state must be saved before torchrun kills its workers
# Added to the time of a follow-up error: torchrun reports the earliest failure, which must be the cause.
FOLLOW_UP_ERROR_SECONDS = 3600
# Messages of gloo and NCCL when the process at the other end of a connection has died.
CONNECTION_LOST = (
    "connection reset",
    "connection closed",
    "broken pipe",
    "remote process exited",
    "socket timeout",
    "heartbeat",
)
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent dies
TORCHRUN_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
# Variables for the number of nodes and the rank of this one, in order of precedence: those of torchrun, of an Indexed
# Job, and of Kubeflow's PyTorchJob, where WORLD_SIZE and RANK count pods.
NNODES = ("NNODES", "PET_NNODES", "WORLD_SIZE")
NODE_RANK = ("NODE_RANK", "PET_NODE_RANK", "JOB_COMPLETION_INDEX", "RANK")


class WorkerLostError(UserError):
    """Another process of the run died, on this node or another, and this one cannot continue without it."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(
            f"another process of the run died ({str(cause).splitlines()[0][:300]})",
            "see its error message, on its node; then restart all processes with --resume auto",
        )


@dataclass(frozen=True)
class ProcessLayout:
    """The processes of a run and the position of this node."""

    nproc_per_node: int = 1
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = ""
    master_port: str = ""

    @property
    def world_size(self) -> int:
        """Processes of the whole run."""
        return self.nproc_per_node * self.nnodes

    def torchrun_args(self) -> list[str]:
        """Flags of torchrun that start the processes of this node.

        On one node torchrun binds a free port itself (--standalone), so that no other process can take it in between.
        """
        if self.nnodes == 1:
            rendezvous = ["--standalone", "--local-addr", "127.0.0.1"]
        else:
            rendezvous = ["--nnodes", f"{self.nnodes}", "--node-rank", f"{self.node_rank}"]
            rendezvous += ["--master-addr", self.master_addr, "--master-port", self.master_port]
        processes = ["--nproc-per-node", f"{self.nproc_per_node}", "--shutdown-timeout", f"{SHUTDOWN_SECONDS}"]
        return [*rendezvous, *processes]


def is_worker(env: Mapping[str, str]) -> bool:
    """Whether a launcher started this process as one of a run's workers."""
    return "LOCAL_RANK" in env


def writes_output(env: Mapping[str, str]) -> bool:
    """Whether this process writes the output folder and prints the result: the worker of rank 0, else node 0."""
    if is_worker(env):
        return env.get("RANK", "0") == "0"
    return _integer(env, NNODES, 1) == 1 or _integer(env, NODE_RANK, 0) == 0


def plan_layout(arguments: TrainArguments, env: Mapping[str, str], gpus: int) -> ProcessLayout:
    """The processes to start, from flags and environment; raises UserError when these do not describe a run.

    gpus: number of GPUs of this node that the run may use.
    """
    if arguments.num_gpus and arguments.num_gpus > gpus:
        raise UserError(
            f"--num-gpus {arguments.num_gpus}: this node has {gpus} usable GPUs",
            "lower it; without GPUs, --num-processes starts processes on the CPU, and --dry-run --gpu-memory GB plans",
        )
    nproc_per_node = arguments.num_gpus or arguments.num_processes or 1
    nnodes, node_rank = _integer(env, NNODES, 1), _integer(env, NODE_RANK, 0)
    if node_rank and not any(env.get(name) for name in NNODES):  # rank 0 may be alone: a Job of one pod has an index
        raise UserError(
            f"the rank of this node is {node_rank}, but the number of nodes is not set",
            f"set {NNODES[0]} to the number of nodes, or to 1 if each trains alone, with its own --output-dir",
        )
    if nnodes == 1:
        return ProcessLayout(nproc_per_node)
    master_addr = env.get("MASTER_ADDR", "")
    if not master_addr:
        raise UserError(f"MASTER_ADDR is not set for {nnodes} nodes", "set it to the host name of the first node")
    if not 0 <= node_rank < nnodes:
        raise UserError(
            f"the rank of this node is {node_rank}, but there are {nnodes} nodes", f"set {NODE_RANK[0]} from 0 up"
        )
    return ProcessLayout(nproc_per_node, nnodes, node_rank, master_addr, env.get("MASTER_PORT", DEFAULT_MASTER_PORT))


def worker_layout(env: Mapping[str, str]) -> ProcessLayout:
    """The run that this worker belongs to: how many processes and nodes; the address stays with the launcher."""
    nproc_per_node = local_world_size(env)
    return ProcessLayout(nproc_per_node, max(1, int(env.get("WORLD_SIZE") or "1") // nproc_per_node))


def start_workers(layout: ProcessLayout, command_line: Sequence[str]) -> None:
    """Run `glm train COMMAND_LINE` in every process of this node and wait until they end.

    Raises UserError with the message of the first process that failed, SystemExit or KeyboardInterrupt on a signal.
    """
    import torch
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    gc.collect()
    torch.cuda.empty_cache()  # the workers need the memory of the base model that answered in this process
    os.environ.setdefault("OMP_NUM_THREADS", f"{max(1, available_cpus() // layout.nproc_per_node)}")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # failures are reported below
    torchrun_command = [*layout.torchrun_args(), "-m", "entrypoints", "train", *command_line]
    logger.info("torchrun %s", " ".join(torchrun_command))
    handlers = {number: signal.getsignal(number) for number in TORCHRUN_SIGNALS}  # torchrun does not restore them
    try:
        run.run(run.parse_args(torchrun_command))  # type: ignore[no-untyped-call]  # torch: both are untyped
    except ChildFailedError as error:
        raise _worker_error(*error.get_first_failure()) from error
    except DistError as error:
        raise WorkerLostError(error) from error
    except SignalException as error:
        if error.sigval.name == "SIGINT":
            raise KeyboardInterrupt from error
        raise SystemExit(128 + error.sigval) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def local_world_size(env: Mapping[str, str]) -> int:
    """Processes of the run on this node, as torchrun or the deepspeed launcher passes it to each of them."""
    return int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or "1")


def terminate_with_launcher() -> None:
    """Get SIGTERM, which saves a checkpoint, when the launcher is killed and cannot forward a signal."""
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):  # Linux only
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send what this process writes to stdout, also from native code, to stderr inside the block."""
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)


def exit_worker() -> None:
    """End a worker that has finished its work at once; does nothing in other processes.

    Observed occasionally with zero3-offload: a thread of DeepSpeed aborts the process while the interpreter shuts down.
    """
    if is_worker(os.environ):
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(0)


def is_connection_lost(error: RuntimeError) -> bool:
    """Whether the message of a collective operation shows that another process died."""
    return any(phrase in str(error).lower() for phrase in CONNECTION_LOST)


def write_error_file(error: UserError, env: Mapping[str, str]) -> bool:
    """Pass a worker's error to the launcher through torchrun's error file; False if torchrun set none."""
    file = env.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return False
    timestamp = int(time.time()) + (FOLLOW_UP_ERROR_SECONDS if isinstance(error, WorkerLostError) else 0)
    content = {"message": json.dumps([error.problem, error.remedy]), "timestamp": timestamp}
    Path(file).write_text(json.dumps(content), encoding="utf-8")
    return True


def _worker_error(rank: int, failure: "ProcessFailure") -> UserError:
    try:
        return UserError(*json.loads(failure.message))
    except (ValueError, TypeError):
        pass
    if failure.exitcode == -signal.SIGKILL:
        return UserError(
            f"process {rank} was killed (SIGKILL): most likely the host ran out of memory",
            "see the host column of --dry-run; use fewer processes or no offload; then continue with --resume auto",
        )
    return UserError(f"process {rank} ended with code {failure.exitcode}", "see its output above")


def _integer(env: Mapping[str, str], names: Sequence[str], default: int) -> int:
    for name in names:
        if env.get(name):
            if not env[name].isdecimal():
                raise UserError(f"{name}={env[name]} is not a number", "set it to a number, or unset it")
            return int(env[name])
    return default
