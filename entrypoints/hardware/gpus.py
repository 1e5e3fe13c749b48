"""The GPUs that this process may use, read through NVML.

CUDA opens a context on each GPU whose memory it is asked about. A context takes hundreds of megabytes of that GPU until
the process ends, in a launcher as long as its workers train. NVML, the library of nvidia-smi, opens none.
"""

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from entrypoints.errors import UserError

NVML = "libnvidia-ml.so.1"  # part of the driver
NAME_BYTES = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE and NVML_DEVICE_UUID_V2_BUFFER_SIZE
FIRST_BF16_CAPABILITY = (8, 0)  # Ampere; CUDA C++ Programming Guide, "Features and Technical Specifications"


@dataclass(frozen=True)
class Gpu:
    """One GPU; memory in bytes."""

    name: str
    total: int
    free: int
    capability: tuple[int, int]  # compute capability, such as (8, 9)

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bfloat16 without emulation."""
        return self.capability >= FIRST_BF16_CAPABILITY


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def list_gpus(library: str = NVML, env: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The GPUs of CUDA_VISIBLE_DEVICES, in its order; all GPUs without it.

    Through CUDA where NVML is missing, or knows the GPUs as something else, as with MIG, or in another order: NVML
    lists them by bus number, CUDA the fastest first unless CUDA_DEVICE_ORDER says otherwise.
    """
    if not torch.cuda.is_available():
        return []
    by_bus = env.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    found = _list_through_nvml(library, env.get("CUDA_VISIBLE_DEVICES"), by_bus)
    return [_ask_cuda(number) for number in range(torch.cuda.device_count())] if found is None else found


def check_compute_capability(architectures: Sequence[str] | None = None) -> None:
    """Raise UserError for GPUs that torch was not built for: builds for CUDA 13 begin with Turing, after V100.

    architectures: such as sm_75; those of the installed torch by default.
    """
    built_for = torch.cuda.get_arch_list() if architectures is None else architectures
    numbers = [int(name.removeprefix("sm_")) for name in built_for if name.removeprefix("sm_").isdecimal()]
    if not numbers:
        return
    oldest = divmod(min(numbers), 10)
    for gpu in list_gpus():
        if gpu.capability < oldest:
            raise UserError(
                f"the GPU {gpu.name} has compute capability {'.'.join(map(str, gpu.capability))}, this torch for CUDA "
                f"{torch.version.cuda} begins with {'.'.join(map(str, oldest))}",
                "build the image with TORCH_FLAVOR=cu126, or use --device cpu",
            )


def _ask_cuda(number: int) -> Gpu:
    free, total = torch.cuda.mem_get_info(number)
    return Gpu(torch.cuda.get_device_name(number), total, free, torch.cuda.get_device_capability(number))


def _list_through_nvml(library: str, visible: str | None, by_bus: bool) -> list[Gpu] | None:
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        return None
    if nvml.nvmlInit_v2():
        return None
    try:
        return [_describe(nvml, handle) for handle in _handles(nvml, visible, by_bus)]
    except (_UnknownGpuError, AttributeError):  # an older library lacks a function
        return None
    finally:
        nvml.nvmlShutdown()


class _UnknownGpuError(Exception):
    """NVML cannot describe what CUDA uses."""


def _handles(nvml: ctypes.CDLL, visible: str | None, by_bus: bool) -> Iterator[ctypes.c_void_p]:
    """The devices that CUDA would list: indices or beginnings of UUIDs, up to the first that does not exist."""
    count = ctypes.c_uint()
    _check(nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)))
    handles = []
    for number in range(count.value):
        handle = ctypes.c_void_p()
        _check(nvml.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(handle)))
        handles.append(handle)
    if not by_bus and len({_text(nvml.nvmlDeviceGetName, handle) for handle in handles}) > 1:
        raise _UnknownGpuError
    if visible is None:
        yield from handles
        return
    uuids = [_text(nvml.nvmlDeviceGetUUID, handle) for handle in handles]
    for name in filter(None, (part.strip() for part in visible.split(","))):
        numbers = [number for number, uuid in enumerate(uuids) if uuid.startswith(name)]
        if name.isdecimal():
            numbers = [int(name)] if int(name) < len(handles) else []
        if name.startswith("MIG-"):
            raise _UnknownGpuError
        if len(numbers) != 1:
            return
        yield handles[numbers[0]]


def _describe(nvml: ctypes.CDLL, handle: ctypes.c_void_p) -> Gpu:
    current, pending = ctypes.c_uint(), ctypes.c_uint()
    if nvml.nvmlDeviceGetMigMode(handle, ctypes.byref(current), ctypes.byref(pending)) == 0 and current.value:
        raise _UnknownGpuError  # CUDA sees one of its instances
    memory, major, minor = _Memory(), ctypes.c_int(), ctypes.c_int()
    _check(nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)))
    _check(nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)))
    name = _text(nvml.nvmlDeviceGetName, handle)
    return Gpu(name, memory.total, memory.free, (major.value, minor.value))


def _text(function: "ctypes._NamedFuncPointer", handle: ctypes.c_void_p) -> str:
    buffer = ctypes.create_string_buffer(NAME_BYTES)
    _check(function(handle, buffer, NAME_BYTES))
    return buffer.value.decode(errors="replace")


def _check(code: int) -> None:
    if code:
        raise _UnknownGpuError
