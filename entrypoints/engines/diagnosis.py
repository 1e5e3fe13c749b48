"""What `glm doctor` says of the machine, one line a thing: what is there, or what is missing and its remedy.

Whether the Docker engine itself knows the GPUs is asked of it by compose/gpu-ready.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
from pathlib import Path

from entrypoints.engines.driver import LIBRARY, check_driver, driver_version
from entrypoints.engines.machine import available_cpus, available_memory, memory_limit
from entrypoints.errors import UserError

KERNEL_MODULE = Path("/proc/driver/nvidia/version")
TOOLKIT = ("nvidia-ctk", "nvidia-container-runtime")
IN_CONTAINER = (Path("/.dockerenv"), Path("/run/.containerenv"), Path("/var/run/secrets/kubernetes.io"))
SHARED = Path("/dev/shm")
ENOUGH_SHARED = 10**9
ENOUGH_DISK = 25 * 10**9  # the 6B as it is downloaded, and converted beside that
ENOUGH_MEMORY = 51 * 10**8  # the 6B as q4_0 with one slot (`fitting`), and the process around it


def driver(library: str = LIBRARY) -> str:
    """NVIDIA's driver, and whether it is new enough for the torch that is installed."""
    module = KERNEL_MODULE.read_text() if KERNEL_MODULE.is_file() else ""
    branch = re.search(r"Module\b.*?\s(\d+\.[\d.]+)", module)
    cuda = driver_version(library)
    if cuda is None:
        if branch:
            return f"{branch[1]} in the kernel, but {LIBRARY} is not here; start the container with --gpus all"
        return "none; install NVIDIA's driver to use its GPUs, processors need none"
    found = f"{branch[1] if branch else 'there'}, for CUDA {cuda // 1000}.{cuda % 1000 // 10}"
    if importlib.util.find_spec("torch") is None:
        return found
    import torch

    if torch.version.cuda is None:
        return f"{found}, but this torch is for processors; set up with TORCH=cuda, or use a CUDA image"
    try:
        check_driver(library, torch.version.cuda)
    except UserError as error:
        return f"too old: {error}"
    return f"{found}, new enough for this torch"


def container_toolkit() -> str:
    """NVIDIA's Container Toolkit, which hands a host's GPUs to its containers."""
    if any(mark.exists() for mark in IN_CONTAINER):
        return "a matter of the host, and this is a container; ask there"
    found = [name for name in TOOLKIT if shutil.which(name)]
    if found:
        return f"{found[0]}; compose/gpu-ready says whether the Docker engine knows it"
    if KERNEL_MODULE.is_file():
        return "missing, so containers get no GPU; install the package nvidia-container-toolkit"
    return "none; without a driver none is needed"


def memory() -> str:
    """What is free, and what a container's limit leaves of it."""
    free, limit = available_memory(), memory_limit()
    told = f"{free / 1e9:.1f} GB available"
    if limit:
        told += f", {limit / 1e9:.1f} GB are the control group's limit"
    if free >= ENOUGH_MEMORY:
        return told
    remedy = "raise the container's limit (--memory, resources.limits)" if limit else "free some"
    return f"{told}; the 6B as q4_0 needs {ENOUGH_MEMORY / 1e9:.1f}: {remedy}"


def processors() -> str:
    """How many threads will compute."""
    usable, there = available_cpus(), os.cpu_count() or 1
    if usable == there:
        return f"{usable}"
    return f"{usable} of {there}, by affinity or the control group's quota; --cpus or resources.limits give more"


def shared_memory() -> str:
    """NCCL and data loaders share memory there; containers get 64 MB of it unless told otherwise."""
    if not SHARED.is_dir():
        return "none"
    free = shutil.disk_usage(SHARED).free
    few = "" if free >= ENOUGH_SHARED else "; several GPUs need 1 GB or more: --shm-size, or an emptyDir of memory"
    return f"{free / 1e9:.1f} GB free{few}"


def disk(folder: Path) -> str:
    """Room where the command was started."""
    free = shutil.disk_usage(folder).free
    few = "" if free >= ENOUGH_DISK else f"; fetching and converting the 6B takes {ENOUGH_DISK / 1e9:.0f}: free some"
    return f"{free / 1e9:.1f} GB free in {folder}{few}"


def version(package: str) -> str:
    """Installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
