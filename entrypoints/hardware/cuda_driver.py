"""Check that the host's NVIDIA driver is new enough for the CUDA version of the installed torch.

Within one major version of CUDA a newer build runs on an older driver, across major versions it does not. Torch then
only warns and computes on the CPU, a hundred times slower.
"""

import ctypes

from entrypoints.errors import UserError

LIBRARY = "libcuda.so.1"
MINIMUM_DRIVERS = {12: "525", 13: "580"}  # driver branches by CUDA version; NVIDIA, "CUDA compatibility", table 1


def check_driver(library: str = LIBRARY, built_for: str | None = None) -> None:
    """Passes without a driver and with a CPU build of torch.

    built_for: CUDA version, that of torch by default. Raises UserError: the driver is too old for it.
    """
    if built_for is None:
        import torch

        built_for = torch.version.cuda
    driver = driver_version(library)
    if built_for is None or driver is None:
        return
    major = int(built_for.split(".")[0])
    if driver // 1000 < major:
        minimum = MINIMUM_DRIVERS.get(major, f"of CUDA {major}")
        raise UserError(
            f"the driver supports CUDA {driver // 1000}.{driver % 1000 // 10}, this torch was built for {built_for}",
            f"install driver {minimum} or newer, build the image with an older TORCH_FLAVOR, or use --device cpu",
        )


def driver_version(library: str = LIBRARY) -> int | None:
    """CUDA version of the driver in CUDA's encoding: 12040 is 12.4; None without a driver."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value if cuda.cuDriverGetVersion(ctypes.byref(version)) == 0 else None
