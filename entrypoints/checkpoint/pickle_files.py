"""Files of torch.save are pickles, which can run code when loaded: only tensors and listed classes are accepted.

`check_pickle` finds the classes and functions in a file without loading it, for an error message that names the file.
`restricted_unpickling` makes every torch.load of the process reject others, also those of libraries.
"""

import contextlib
import enum
import importlib
import os
import pickle
import pkgutil
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.serialization import get_safe_globals, get_unsafe_globals_in_checkpoint, safe_globals

from entrypoints.errors import UserError

# What DeepSpeed saves beside tensors. None of them runs code or opens a file when created with any arguments.
DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
# The state of numpy's random generator: the Trainer allows these itself, and only while it loads rng_state*.pth.
NUMPY_CLASSES = ("numpy._core.multiarray._reconstruct", "numpy.dtype", "numpy.dtypes.UInt32DType", "numpy.ndarray")
GETATTR = "builtins.getattr"  # Python 3.11.0 to 3.11.3 pickle a member of an enumeration as getattr(class, name)
FORCE_VARIABLE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # read by torch.load, and stronger than an explicit weights_only=False
OPPOSITE_VARIABLE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch.load fails if both are set
MAX_LISTED_NAMES = 4  # classes and functions in one error message


def check_pickle(file: Path, remedy: str) -> None:
    """Raise UserError with `remedy` if the file contains more than tensors and listed classes; no code of it runs."""
    try:
        found = _find_unknown_names(file)
    except Exception as error:  # torch raises many kinds for a file that torch.save did not write
        reason = format_load_error(error)
        raise UserError(f"{file} is damaged or could run code when loaded ({reason})", remedy) from error
    if found:
        raise UserError(f"{file} could run code when loaded (contains {', '.join(found[:MAX_LISTED_NAMES])})", remedy)


@contextlib.contextmanager
def restricted_unpickling() -> Iterator[None]:
    """Let torch.load accept only tensors and listed classes inside the block, in this process and those it starts.

    Import deepspeed before: its classes are allowed only if it is loaded. torch.load raises pickle.UnpicklingError.
    """
    names = DEEPSPEED_CLASSES if "deepspeed" in sys.modules else ()
    accepted = {*(pkgutil.resolve_name(name) for name in names), (_get_enum_member, GETATTR)}
    variables = {name: os.environ.pop(name, None) for name in (FORCE_VARIABLE, OPPOSITE_VARIABLE)}
    os.environ[FORCE_VARIABLE] = "1"
    try:
        with safe_globals(list(accepted.difference(get_safe_globals()))):
            yield
    finally:
        os.environ.pop(FORCE_VARIABLE, None)
        os.environ.update({name: value for name, value in variables.items() if value is not None})


def format_load_error(error: Exception) -> str:
    """The reason in an error of torch.load, without its advice to load the file with weights_only=False."""
    text = str(error) or repr(error)
    name = re.search(r"GLOBAL (\S+)", text)
    if name:
        return f"contains {name[1]}"
    if "eights only" in text or "weights_only" in text:
        return "contains more than tensors"
    return text.splitlines()[0][:200]


def _find_unknown_names(file: Path) -> list[str]:
    """Classes and functions that loading the file would need and that are not listed."""
    zipped = zipfile.is_zipfile(file)
    found = set(get_unsafe_globals_in_checkpoint(file)) if zipped else {GETATTR}
    unknown = found.difference(DEEPSPEED_CLASSES, NUMPY_CLASSES, (GETATTR,))
    if unknown or GETATTR not in found:
        return sorted(unknown)
    # Only loading shows what getattr is called with, and the names in a file of the format before torch 1.6, which a
    # DeepSpeed configuration can still select.
    with contextlib.suppress(ImportError):
        importlib.import_module("deepspeed")
    with restricted_unpickling(), warnings.catch_warnings(action="ignore"):
        torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    return []


def _get_enum_member(kind: object, name: object) -> enum.Enum:
    """What a pickle gets in place of getattr: the member `name` of a listed enumeration, and no other attribute."""
    members = kind.__members__ if isinstance(kind, type) and issubclass(kind, enum.Enum) else {}
    if not isinstance(name, str) or name not in members:
        raise pickle.UnpicklingError(f"contains {GETATTR} of something that is not a member of an enumeration")
    return members[name]
