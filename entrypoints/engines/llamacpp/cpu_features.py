"""The CPU code of llama.cpp: what it needs, which variant of it is loaded, what it does not use.

The published build of xllamacpp has the code for CPUs with AVX2. The package `glm-llamacpp-cpu`, which `make llamacpp`
compiles and the images contain, has libraries for newer kinds of CPU; llama.cpp itself selects the best one.
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
import platform
import re
from pathlib import Path

from entrypoints.errors import UserError
from entrypoints.hardware.resources import cpu_flags

VARIANTS_PACKAGE = "glm_llamacpp_cpu"
VARIANT = re.compile(r"/libggml-cpu-([\w.]+)\.so$", re.MULTILINE)
MAPPED_FILES = Path("/proc/self/maps")
REQUIRED_CPU_FLAGS = ("avx2", "bmi2", "f16c", "fma")  # what the published x86 build of xllamacpp is compiled for
# Instruction sets of newer x86 CPUs that speed up matrix multiplication: llama.cpp's name, and that of Linux
OPTIONAL_CPU_FLAGS = {
    "AVX_VNNI": "avx_vnni",
    "AVX512": "avx512f",
    "AVX512_VBMI": "avx512vbmi",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AMX_INT8": "amx_int8",
}
NAME, PATH, REGISTRATION, LOGGER = ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p
LogFunction = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


def load_cpu_code() -> None:
    """Load the best variant; call it before llama.cpp computes anything.

    Raises UserError where llama.cpp would crash with SIGILL, or the variants belong to another version.
    """
    _require_flags(
        REQUIRED_CPU_FLAGS,
        "use another machine, or a converted folder with transformers; a virtual machine may hide CPU features",
    )
    if folder := _variants_folder():
        _load_best_variant(folder)
        return
    compiled = tuple(OPTIONAL_CPU_FLAGS[name] for name in _compiled_features())  # known once the library is loaded
    _require_flags(compiled, "this build was compiled for another CPU: install the published xllamacpp")


def loaded_variant() -> str | None:
    """Name of the loaded variant, such as haswell; None if there is none, or the system does not tell."""
    if not MAPPED_FILES.is_file():
        return None
    found = VARIANT.search(MAPPED_FILES.read_text())
    return found[1] if found else None


def unused_cpu_features() -> list[str]:
    """Optional features of this x86 CPU that the build does not use, by llama.cpp's names."""
    if _variants_folder():  # llama.cpp has no code for the others
        return []
    flags, used = cpu_flags(), _compiled_features()
    return [name for name, flag in OPTIONAL_CPU_FLAGS.items() if _is_x86() and flag in flags and name not in used]


def _variants_folder() -> Path | None:
    package = importlib.util.find_spec(VARIANTS_PACKAGE)
    folders = package.submodule_search_locations if package else None
    return Path(folders[0]) if folders and importlib.util.find_spec("xllamacpp") else None


@functools.cache
def _load_best_variant(folder: Path) -> None:
    """Replace the CPU code of the library by the best variant of the folder; keep it if none runs here."""
    version = importlib.metadata.version("xllamacpp")
    if (folder / "VERSION").read_text().strip() != version:
        raise UserError(f"{folder} was compiled for another version than xllamacpp {version}", "run make llamacpp")
    from xllamacpp import xllamacpp

    # the variants use functions of this library
    library = ctypes.CDLL(xllamacpp.__file__, mode=ctypes.RTLD_GLOBAL)
    library.ggml_backend_reg_by_name.argtypes, library.ggml_backend_reg_by_name.restype = [NAME], REGISTRATION
    library.ggml_backend_reg_count.restype = ctypes.c_size_t
    library.ggml_backend_unload.argtypes, library.ggml_backend_load_all_from_path.argtypes = [REGISTRATION], [PATH]
    library.ggml_log_set.argtypes = [LOGGER, ctypes.c_void_p]
    silent = LogFunction(lambda level, text, data: None)
    library.ggml_log_set(ctypes.cast(silent, LOGGER), None)  # it would print which library it loads
    before, original = library.ggml_backend_reg_count(), library.ggml_backend_reg_by_name(b"CPU")
    library.ggml_backend_load_all_from_path(str(folder).encode())
    if library.ggml_backend_reg_count() > before:
        library.ggml_backend_unload(original)
    library.ggml_log_set(None, None)


def _require_flags(required: tuple[str, ...], remedy: str) -> None:
    flags = cpu_flags()
    missing = [flag for flag in required if flag not in flags]
    if flags and missing and _is_x86():
        raise UserError(f"this CPU has no {', '.join(missing)}, which this build of llama.cpp needs", remedy)


def _compiled_features() -> list[str]:
    try:
        import xllamacpp
    except ImportError:  # reported by `require_packages`
        return []
    entries = xllamacpp.get_system_info().replace("|", ":").split(":")  # "CPU : AVX2 = 1 | AVX512 = 1 | ..."
    enabled = {entry.split("=")[0].strip() for entry in entries if entry.strip().endswith("= 1")}
    return [name for name in OPTIONAL_CPU_FLAGS if name in enabled]


def _is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")
