"""The CPU code of llama.cpp: what it needs, which variant of it is loaded, what it does not use.

The published build of xllamacpp has the code for x86 CPUs with AVX2, and for Arm CPUs without dot products. Beside it,
in the folder `glm_llamacpp_cpu` that `images/scripts/llamacpp` compiles, are libraries for newer CPUs; the widest one
that this CPU runs replaces that code.
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
import platform
from pathlib import Path

from entrypoints.errors import UserError
from entrypoints.hardware.resources import cpu_flags

VARIANTS_FOLDER = "glm_llamacpp_cpu"
REQUIRED_CPU_FLAGS = ("avx2", "bmi2", "f16c", "fma")  # what the published x86 build of xllamacpp is compiled for
AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
AMX = {"avx512_vnni", "avx512vbmi", "avx512_bf16", "amx_tile", "amx_int8"}
ARMV8_2 = {"asimddp", "asimdhp"}  # dot products and half precision
# For each architecture from the narrowest to the widest, with the flags that each needs besides the required ones
ALL_VARIANTS = {
    "x86_64": {
        "alderlake": {"avx_vnni"},
        "skylakex": AVX512,
        "cascadelake": AVX512 | {"avx512_vnni"},
        "sapphirerapids": AVX512 | AMX,
    },
    "aarch64": {
        "armv8.2_2": ARMV8_2,
        "armv8.6_1": ARMV8_2 | {"sve", "i8mm"},
        "armv8.6_2": ARMV8_2 | {"sve", "i8mm", "sve2"},
    },
}
VARIANTS = ALL_VARIANTS.get(platform.machine(), {})
# Instruction sets of newer CPUs that speed up matrix multiplication: llama.cpp's name, and that of Linux
OPTIONAL_CPU_FLAGS = {
    "AVX_VNNI": "avx_vnni",
    "AVX512": "avx512f",
    "AVX512_VBMI": "avx512vbmi",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AMX_INT8": "amx_int8",
    "DOTPROD": "asimddp",
    "FP16_VA": "asimdhp",
    "SVE": "sve",
    "MATMUL_INT8": "i8mm",
}
NAME, REGISTRATION = ctypes.c_char_p, ctypes.c_void_p
LogFunction = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


def load_cpu_code() -> str | None:
    """Load the widest variant that this CPU runs, and return its name; None if there is none.

    Call it before llama.cpp computes anything. Raises UserError where llama.cpp would crash with SIGILL, or the variant
    does not fit the installed library.
    """
    if platform.machine() == "x86_64":
        _require_flags(
            REQUIRED_CPU_FLAGS,
            "use another machine, or a converted folder with transformers; a virtual machine may hide CPU features",
        )
    if library := _variant():
        _replace_cpu_code(library)
        return library.stem.removeprefix("libggml-cpu-")
    compiled = tuple(OPTIONAL_CPU_FLAGS[name] for name in _compiled_features())  # known once the library is loaded
    _require_flags(compiled, "this build was compiled for another CPU: install the published xllamacpp")
    return None


def unused_cpu_features() -> list[str]:
    """Optional features of this CPU that the build does not use, by llama.cpp's names."""
    folder = _variants_folder()
    if folder and folder.is_dir():  # a variant without them is as fast
        return []
    flags, used = cpu_flags(), _compiled_features()
    return [name for name, flag in OPTIONAL_CPU_FLAGS.items() if flag in flags and name not in used]


def _variants_folder() -> Path | None:
    """Where the variants look for the library that they belong to: beside it."""
    package = importlib.util.find_spec("xllamacpp")
    return Path(package.origin).parent.parent / VARIANTS_FOLDER if package and package.origin else None


def _variant() -> Path | None:
    folder, flags = _variants_folder(), cpu_flags()
    libraries = [folder / f"libggml-cpu-{name}.so" for name, needed in VARIANTS.items() if folder and needed <= flags]
    return next((library for library in reversed(libraries) if library.is_file()), None)


@functools.cache
def _replace_cpu_code(variant: Path) -> None:
    version, file = importlib.metadata.version("xllamacpp"), variant.parent / "VERSION"
    if not file.is_file():
        raise UserError(f"{variant.parent} is incomplete: {file.name} is missing", "run make llamacpp")
    if (compiled := file.read_text().strip()) != version:
        raise UserError(f"{variant.parent} belongs to xllamacpp {compiled}, not {version}", "run make llamacpp")
    from xllamacpp import xllamacpp

    library = ctypes.CDLL(xllamacpp.__file__)
    library.ggml_backend_reg_by_name.argtypes, library.ggml_backend_reg_by_name.restype = [NAME], REGISTRATION
    library.ggml_backend_load.argtypes, library.ggml_backend_load.restype = [NAME], REGISTRATION
    library.ggml_backend_unload.argtypes = [REGISTRATION]
    library.ggml_log_set.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    silent = LogFunction(lambda level, text, data: None)
    library.ggml_log_set(ctypes.cast(silent, ctypes.c_void_p), None)  # it would print which library it loads
    published = library.ggml_backend_reg_by_name(b"CPU")
    loaded = library.ggml_backend_load(str(variant).encode())
    library.ggml_log_set(None, None)
    if not loaded:
        raise UserError(f"llama.cpp cannot load {variant}", "run make llamacpp, or delete this folder")
    library.ggml_backend_unload(published)


def _require_flags(required: tuple[str, ...], remedy: str) -> None:
    flags = cpu_flags()
    missing = [flag for flag in required if flag not in flags]
    if flags and missing:
        raise UserError(f"this CPU has no {', '.join(missing)}, which this build of llama.cpp needs", remedy)


def _compiled_features() -> list[str]:
    try:
        import xllamacpp
    except ImportError:  # reported by `require_packages`
        return []
    entries = xllamacpp.get_system_info().replace("|", ":").split(":")  # "CPU : AVX2 = 1 | AVX512 = 1 | ..."
    enabled = {entry.split("=")[0].strip() for entry in entries if entry.strip().endswith("= 1")}
    return [name for name in OPTIONAL_CPU_FLAGS if name in enabled]
