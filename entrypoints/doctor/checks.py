"""The checks of `glm doctor`: each returns one line of text with what was found, or what is missing and the remedy.

compose/gpu-ready checks whether the Docker engine supports GPUs.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
from pathlib import Path

from entrypoints.errors import UserError
from entrypoints.hardware.cuda_driver import LIBRARY, check_driver, driver_version
from entrypoints.hardware.resources import available_cpus, available_memory, memory_limit
from entrypoints.sizes import format_size

KERNEL_MODULE = Path("/proc/driver/nvidia/version")
TOOLKIT_COMMANDS = ("nvidia-ctk", "nvidia-container-runtime")
CONTAINER_MARKERS = (Path("/.dockerenv"), Path("/run/.containerenv"), Path("/var/run/secrets/kubernetes.io"))
DATA_FOLDERS = tuple(map(Path, ("/models", "/outputs", "/usage")))  # in Compose and Kubernetes
SHARED_MEMORY_FOLDER = Path("/dev/shm")
MIN_SHARED_MEMORY_BYTES = 10**9
MIN_DISK_BYTES = 25 * 10**9  # the 6B model as downloaded, and its converted copy
MIN_MEMORY_BYTES = 51 * 10**8  # the 6B model as q4_0 with one slot (`model_fit.file_memory_bytes`), and the process


def driver(library: str = LIBRARY) -> str:
    """Version of the NVIDIA driver, and whether it is new enough for the installed torch."""
    module = KERNEL_MODULE.read_text() if KERNEL_MODULE.is_file() else ""
    version = re.search(r"Module\b.*?\s(\d+\.[\d.]+)", module)
    cuda = driver_version(library)
    if cuda is None:
        if version:
            return f"{version[1]} in the kernel, but {LIBRARY} was not found; start the container with --gpus all"
        return "none; to use a GPU, install the NVIDIA driver; CPUs need none"
    found = f"{version[1] if version else 'installed'}, supports CUDA {cuda // 1000}.{cuda % 1000 // 10}"
    if importlib.util.find_spec("torch") is None:
        return found
    import torch

    if torch.version.cuda is None:
        return f"{found}, but this torch is a CPU build; set up with TORCH=cuda, or use a CUDA image"
    try:
        check_driver(library, torch.version.cuda)
    except UserError as error:
        return f"too old: {error}"
    return f"{found}, new enough for this torch"


def container_toolkit() -> str:
    """The NVIDIA Container Toolkit, which gives containers access to the host's GPUs."""
    if any(marker.exists() for marker in CONTAINER_MARKERS):
        return "not checked inside a container; run glm doctor on the host"
    found = [name for name in TOOLKIT_COMMANDS if shutil.which(name)]
    if found:
        return f"{found[0]}; compose/gpu-ready checks whether the Docker engine uses it"
    if KERNEL_MODULE.is_file():
        return "missing, so containers have no GPU; install the package nvidia-container-toolkit"
    return "none; not needed without a driver"


def memory() -> str:
    """Available memory, and the limit of the container."""
    free, limit = available_memory(), memory_limit()
    found = f"{format_size(free)} available"
    if limit:
        found += f", cgroup limit {format_size(limit)}"
    if free >= MIN_MEMORY_BYTES:
        return found
    remedy = "raise the container's limit (--memory, resources.limits)" if limit else "free memory"
    return f"{found}; the 6B model as q4_0 needs {format_size(MIN_MEMORY_BYTES)}: {remedy}"


def cpus() -> str:
    """CPUs available to the process; the number of threads that compute."""
    usable, total = available_cpus(), os.cpu_count() or 1
    if usable == total:
        return f"{usable}"
    return f"{usable} of {total}, limited by CPU affinity or the cgroup quota; raise it with --cpus or resources.limits"


def shared_memory() -> str:
    """Free space in /dev/shm, which NCCL and data loaders use; containers get 64 MB of it by default."""
    if not SHARED_MEMORY_FOLDER.is_dir():
        return "none"
    free = shutil.disk_usage(SHARED_MEMORY_FOLDER).free
    remedy = "; several GPUs need 1 GB or more: --shm-size, or an emptyDir with medium Memory"
    return f"{format_size(free)} free{'' if free >= MIN_SHARED_MEMORY_BYTES else remedy}"


def disk(folder: Path) -> str:
    """Free disk space in the folder."""
    free = shutil.disk_usage(folder).free
    remedy = f"; downloading and converting the 6B model takes {MIN_DISK_BYTES / 1e9:.0f} GB: free space"
    return f"{format_size(free)} free in {folder}{'' if free >= MIN_DISK_BYTES else remedy}"


def volumes() -> list[Path]:
    """The folders with data that are mounted into this container."""
    return [folder for folder in DATA_FOLDERS if folder.is_mount()]


def usage(folder: Path) -> str:
    """Size of the files in a folder, and free disk space."""
    used = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    return f"{format_size(used)} in {folder}, {format_size(shutil.disk_usage(folder).free)} free"


def package_version(package: str) -> str:
    """Installed version of a package, or "missing"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
