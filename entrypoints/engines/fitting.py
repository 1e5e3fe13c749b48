"""What to choose for a machine: the best of what fits, computed from the model's own numbers."""

from dataclasses import dataclass

from entrypoints.checkpoint.gguf_plan import plans
from entrypoints.checkpoint.layout import Shape
from entrypoints.engines.llamacpp_engine import needed_bytes
from entrypoints.engines.placement import HEADROOM, loaded_bytes, weight_bytes
from entrypoints.settings import LOADS

GB = 10**9
HOST_SIZES = (8, 16, 32, 64)  # GB of memory
GPU_SIZES = (6, 8, 16, 24, 80)
SYSTEM = 2 * GB  # of the host's memory, for all that runs beside
CONTEXT = 1 * GB  # of a GPU's, for CUDA itself
FILES = ("q8_0", "q5_k_m", "q4_k_m", "q4_0")  # the nearest to the source first; f16 is slower and hardly nearer
DTYPES = (("float32", 4), ("bfloat16", 2))


@dataclass(frozen=True)
class Choice:
    """One size of memory, and what fits into it, the best first."""

    gigabytes: int
    fits: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join(self.fits) or "nothing of this model"


def file_memory(shape: Shape, type_: str) -> int:
    """Bytes that llama.cpp takes for a file of this type with one slot of the whole window."""
    return needed_bytes(shape, sum(plan.size for plan in plans(shape, type_)), slots=1, window=shape.window)


def host_choices(shape: Shape) -> list[Choice]:
    """For a machine without a GPU, by its memory: GGUF types, and the folder in transformers."""
    return [Choice(size, _fitting(_host_needs(shape), size * GB - SYSTEM)) for size in HOST_SIZES]


def here(shape: Shape, free: int) -> tuple[str, ...]:
    """The same for so many free bytes."""
    return _fitting(_host_needs(shape), free)


def gpu_choices(shape: Shape) -> list[Choice]:
    """For one GPU, by its memory: in how many bits the folder fits, and beside it how many answers of a full window."""
    cache = shape.cache_bytes(shape.window)
    ways = {"16 bits": weight_bytes(shape, 2)}
    ways |= {f"--load-in {load_in}": loaded_bytes(shape, load_in, 2) for load_in in LOADS}
    found = []
    for size in GPU_SIZES:
        windows = {way: (size * GB - CONTEXT - int(stored * HEADROOM)) // cache for way, stored in ways.items()}
        found.append(Choice(size, tuple(f"{way} ({count} windows)" for way, count in windows.items() if count > 0)))
    return found


def _host_needs(shape: Shape) -> dict[str, int]:
    needs = {type_: file_memory(shape, type_) for type_ in FILES}
    return needs | {f"the folder in {name}": int(weight_bytes(shape, size) * HEADROOM) for name, size in DTYPES}


def _fitting(needs: dict[str, int], room: int) -> tuple[str, ...]:
    return tuple(f"{name} ({needed / GB:.1f} GB)" for name, needed in needs.items() if needed <= room)
