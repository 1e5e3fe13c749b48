"""From one command to the processes of a run: torchrun on this machine, or a place among several machines.

A process that torchrun or the deepspeed launcher started (LOCAL_RANK is set) takes part in the run. Any other starts
torchrun itself when there is more than one process to run: on one machine with a free port, on several at the address
that Kubernetes or the user names.
"""

import ctypes
import gc
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from entrypoints.engines.machine import available_cpus
from entrypoints.errors import UserError
from entrypoints.training.arguments import TrainArguments

logger = logging.getLogger(__name__)
MASTER_PORT = "29500"  # where several machines meet if none is named
SHUTDOWN_SECONDS = 1800  # a save of the whole state must end before torchrun kills its processes
CONSEQUENCE_SECONDS = 3600  # what torchrun takes for the first failure must be the cause
# What gloo and NCCL say when a process at the other end is gone.
LOST = ("connection reset", "connection closed", "broken pipe", "remote process exited", "socket timeout", "heartbeat")
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal a process gets when the one that started it is gone
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
# Who names the number of machines and this one's place among them, in this order: torchrun's own words, an Indexed
# Job, and the PyTorchJob of Kubeflow, where WORLD_SIZE and RANK count pods.
NODES = ("NNODES", "PET_NNODES", "WORLD_SIZE")
NODE_RANK = ("NODE_RANK", "PET_NODE_RANK", "JOB_COMPLETION_INDEX", "RANK")


class LostProcess(UserError):
    """A process of the run went away, on this machine or another, and this one cannot go on without it."""

    def __init__(self, said: object) -> None:
        super().__init__(
            f"another process of the run went away ({str(said).splitlines()[0][:300]})",
            "see what it said, on its machine; then start all of them again with --resume auto",
        )


@dataclass(frozen=True)
class Layout:
    """How many processes a run has, and where this machine stands."""

    per_node: int = 1
    nodes: int = 1
    node_rank: int = 0
    address: str = "127.0.0.1"
    port: str = "0"

    @property
    def processes(self) -> int:
        """Of the whole run."""
        return self.per_node * self.nodes

    def torchrun_words(self) -> list[str]:
        """The flags of torchrun that start this machine's processes."""
        return [
            "--nnodes", f"{self.nodes}", "--node-rank", f"{self.node_rank}", "--nproc-per-node", f"{self.per_node}",
            "--master-addr", self.address, "--master-port", self.port, "--shutdown-timeout", f"{SHUTDOWN_SECONDS}",
        ]  # fmt: skip


def is_worker(env: Mapping[str, str]) -> bool:
    """Was this process started by a launcher, as one of a run's processes?"""
    return "LOCAL_RANK" in env


def is_main(env: Mapping[str, str]) -> bool:
    """Does this process write and print for the run?"""
    return env.get("RANK", "0") == "0" if is_worker(env) else True


def layout(arguments: TrainArguments, env: Mapping[str, str], gpus: int) -> Layout:
    """Decide from flags and environment; raises UserError when they do not make a run.

    gpus: how many this machine has and the run may use.
    """
    if arguments.num_gpus and arguments.num_gpus > gpus:
        raise UserError(
            f"--num-gpus {arguments.num_gpus}: this machine has {gpus} GPUs for it",
            "lower it; without GPUs, --num-processes starts processes on the CPU",
        )
    per_node = arguments.num_gpus or arguments.num_processes or 1
    nodes, node_rank = _number(env, NODES, 1), _number(env, NODE_RANK, 0)
    if node_rank and not any(env.get(name) for name in NODES):  # 0 may be all there is: a Job of one pod has an index
        raise UserError(
            f"this machine's number is {node_rank}, and nothing says of how many",
            f"set {NODES[0]} to how many train together, or to 1 where each trains alone, into a folder of its own",
        )
    if nodes == 1:
        return Layout(per_node, port=_free_port())
    address = env.get("MASTER_ADDR", "")
    if not address:
        raise UserError(f"{nodes} machines have no place to meet", "set MASTER_ADDR to the first one's name")
    if not 0 <= node_rank < nodes:
        raise UserError(f"this machine's number is {node_rank}, of {nodes}", f"set {NODE_RANK[0]} from 0 up")
    return Layout(per_node, nodes, node_rank, address, env.get("MASTER_PORT", MASTER_PORT))


def joined(env: Mapping[str, str]) -> Layout:
    """The run that a launcher made this process part of: how many there are, not where they meet."""
    per_node = beside(env)
    return Layout(per_node, max(1, int(env.get("WORLD_SIZE") or "1") // per_node))


def start(layout: Layout, words: Sequence[str]) -> None:
    """Run `glm train WORDS` in every process of this machine and wait; ends as the processes end.

    Raises UserError with what the first process to fail said, SystemExit or KeyboardInterrupt when told to stop.
    """
    import torch
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    gc.collect()
    torch.cuda.empty_cache()  # the base model has answered here: its memory belongs to the processes now
    os.environ.setdefault("OMP_NUM_THREADS", f"{max(1, available_cpus() // layout.per_node)}")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it would say is said below
    command = [*layout.torchrun_words(), "-m", "entrypoints", "train", *words]
    logger.info("torchrun %s", " ".join(command))
    handlers = {number: signal.getsignal(number) for number in HANDLED}  # torchrun leaves its own behind
    try:
        run.run(run.parse_args(command))
    except ChildFailedError as error:
        raise _told(*error.get_first_failure()) from error
    except DistError as error:
        raise LostProcess(error) from error
    except SignalException as error:
        if error.sigval.name == "SIGINT":
            raise KeyboardInterrupt from error
        raise SystemExit(128 + error.sigval) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def beside(env: Mapping[str, str]) -> int:
    """Processes of the run on this machine, as torchrun or the deepspeed launcher tells each of them."""
    return int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or "1")


def end_with_launcher() -> None:
    """Get SIGTERM, which saves and ends, when the launcher is killed and cannot pass one on."""
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):  # Linux alone has it
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def leave() -> NoReturn:
    """End this process, whose work is done, at once.

    Seen now and then with zero3-offload: while the interpreter ends, a thread of DeepSpeed's aborts the process.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def is_loss(error: RuntimeError) -> bool:
    """Does it say that a process at the other end is gone?"""
    return any(words in str(error).lower() for words in LOST)


def report(error: UserError, env: Mapping[str, str]) -> bool:
    """Hand a worker's mistake to the process that started it; False if nobody there reads it."""
    file = env.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return False
    when = int(time.time()) + (CONSEQUENCE_SECONDS if isinstance(error, LostProcess) else 0)
    told = {"message": json.dumps([error.problem, error.remedy]), "timestamp": when}
    Path(file).write_text(json.dumps(told), encoding="utf-8")
    return True


def _told(rank: int, failure: object) -> UserError:
    try:
        return UserError(*json.loads(failure.message))
    except (ValueError, TypeError):
        pass
    if failure.exitcode == -9:
        return UserError(
            f"process {rank} was killed (SIGKILL): the machine ran out of memory, most likely",
            "see the host column of --dry-run; fewer processes, or no offload, need less; then --resume auto",
        )
    return UserError(f"process {rank} ended with code {failure.exitcode}", "see what it said above")


def _number(env: Mapping[str, str], names: Sequence[str], default: int) -> int:
    for name in names:
        if env.get(name):
            if not env[name].isdecimal():
                raise UserError(f"{name}={env[name]} is no number", "set it to one, or unset it")
            return int(env[name])
    return default


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"{probe.getsockname()[1]}"
