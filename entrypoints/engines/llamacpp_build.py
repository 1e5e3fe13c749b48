"""What the build of llama.cpp at hand asks of this processor, and what of the processor it leaves unused."""

import platform

from entrypoints.engines.machine import processor_flags
from entrypoints.errors import UserError

PUBLISHED = ("avx2", "bmi2", "f16c", "fma")  # what the published x86 build of xllamacpp is compiled for
# llama.cpp's names of what newer x86 processors have, where it multiplies faster with it, and those of Linux
NEWER = {
    "AVX_VNNI": "avx_vnni",
    "AVX512": "avx512f",
    "AVX512_VBMI": "avx512vbmi",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AMX_INT8": "amx_int8",
}


def require_processor() -> None:
    """Raise UserError where llama.cpp would end with SIGILL; call it before its library computes."""
    _require(PUBLISHED, "use another machine or a converted folder with transformers; a virtual machine may hide them")
    newer = tuple(NEWER[name] for name in _compiled_for())  # known only once the library is loaded
    _require(newer, "it was compiled for another kind: `make llamacpp`, or LLAMACPP_CPU for an image, compiles it anew")


def unused() -> list[str]:
    """Names, as llama.cpp's, of what this x86 processor has and the build does not use."""
    flags, used = processor_flags(), _compiled_for()
    return [name for name, flag in NEWER.items() if _x86() and flag in flags and name not in used]


def _require(needed: tuple[str, ...], remedy: str) -> None:
    flags = processor_flags()
    missing = [flag for flag in needed if flag not in flags]
    if flags and missing and _x86():
        raise UserError(f"this processor has no {', '.join(missing)}, which llama.cpp's build needs", remedy)


def _compiled_for() -> list[str]:
    try:
        import xllamacpp
    except ImportError:  # told where it is needed
        return []
    words = xllamacpp.get_system_info().replace("|", ":").split(":")  # "CPU : AVX2 = 1 | AVX512 = 1 | ..."
    on = {word.split("=")[0].strip() for word in words if word.strip().endswith("= 1")}
    return [name for name in NEWER if name in on]


def _x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")
