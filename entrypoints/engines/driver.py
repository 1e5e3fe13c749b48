"""Is the host's NVIDIA driver new enough for the CUDA that torch was built for?

Within one major version of CUDA a newer build runs on an older driver, across versions it does not. Torch only warns
and computes on the processor then, a hundred times slower.
"""

import ctypes

from entrypoints.errors import UserError

LIBRARY = "libcuda.so.1"
MINIMUM_DRIVERS = {12: "525", 13: "580"}  # first driver branches; NVIDIA, "CUDA compatibility", table 1


def check_driver(library: str = LIBRARY, built_for: str | None = None) -> None:
    """Do nothing without a driver or with a CPU build of torch.

    Raises UserError: the driver is older than `built_for` (torch's own if not given) needs.
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
            f"the driver is for CUDA {driver // 1000}.{driver % 1000 // 10}, this torch was built for {built_for}",
            f"install driver {minimum} or newer, build the image with an older TORCH_FLAVOUR, or use --device cpu",
        )


def driver_version(library: str = LIBRARY) -> int | None:
    """As CUDA counts: 12040 is 12.4; None without a driver."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value if cuda.cuDriverGetVersion(ctypes.byref(version)) == 0 else None
