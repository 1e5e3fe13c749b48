"""Read the tensors of a checkpoint folder, stored as safetensors or .bin, in one file or in shards.

Nothing is unpickled beyond plain tensors. Files are memory-mapped, so opening a 12 GB checkpoint takes no memory.
"""

import logging
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from entrypoints.checkpoint.atomic_files import check_not_lfs_pointer, read_safetensors_header
from entrypoints.checkpoint.pickle_files import format_load_error
from entrypoints.errors import UserError
from entrypoints.untrusted import confined_path, read_json_file

logger = logging.getLogger(__name__)
# preferred format first: safetensors headers can be checked without unpickling anything
FORMATS = (("safetensors", "model", "safetensors"), ("bin", "pytorch_model", "bin"))  # label, stem, suffix
MAX_LISTED_NAMES = 4  # tensor names in one error message
COPY_AGAIN = "copy or download the file again"


@dataclass(frozen=True)
class TensorInfo:
    """Location, shape and type of a stored tensor, known without reading its data."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of its data in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of a folder by name."""

    folder: Path
    tensors: dict[str, TensorInfo]

    def load_file(self, file: Path) -> dict[str, torch.Tensor]:
        """All tensors of one file, memory-mapped."""
        return dict(_iter_tensors(file))

    def check_shapes(self, expected: dict[str, tuple[int, ...]], optional: frozenset[str] = frozenset()) -> None:
        """Raises UserError naming the tensors that are missing, unexpected or of the wrong shape."""
        problems = _summary("missing", [name for name in expected if name not in self.tensors])
        problems += _summary(
            "unexpected", [name for name in self.tensors if name not in expected and name not in optional]
        )
        problems += _summary(
            "of the wrong shape",
            [
                f"{name} {list(self.tensors[name].shape)}, not {list(shape)}"
                for name, shape in expected.items()
                if name in self.tensors and self.tensors[name].shape != shape
            ],
        )
        if problems:
            raise UserError(
                f"{self.folder} has tensors {'; '.join(problems)}", "download the checkpoint again, with config.json"
            )

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError: the file is missing, an LFS pointer or damaged."""
    if not file.is_file():
        raise UserError(f"{file.parent} contains no {file.name}", "give the path of a checkpoint folder")
    check_not_lfs_pointer(file)
    value = read_json_file(file)
    if not isinstance(value, dict):
        raise UserError(f"{file} is not a JSON object", "download the file again")
    return value


def open_weight_files(folder: Path) -> WeightFiles:
    """Find and check the weight files of a folder: safetensors if there are any, otherwise .bin.

    Raises UserError naming a file that is missing, truncated or an LFS pointer.
    """
    if not folder.is_dir():
        raise UserError(f"folder not found: {folder}", "give the path of a checkpoint folder")
    for label, stem, suffix in FORMATS:
        files = _weight_files(folder, stem, suffix)
        if files:
            logger.debug("reading %d %s file(s) of %s", len(files), label, folder)
            return WeightFiles(folder, {name: tensor for file in files for name, tensor in _tensor_infos(file)})
    raise UserError(f"{folder} contains no weights", "it needs model*.safetensors or pytorch_model*.bin")


def _weight_files(folder: Path, stem: str, suffix: str) -> list[Path]:
    index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
    if not index.is_file():
        shards = sorted(folder.glob(f"{stem}-*-of-*.{suffix}"))
        if shards and not single.is_file():
            raise UserError(f"{folder} contains {shards[0].name} but no {index.name}", "download the index file too")
        return [single] if single.is_file() else []
    weight_map = read_json(index).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(name, str) for name in weight_map.values())):
        raise UserError(f"{index} has no weight_map of file names", "download the file again")
    other = [name for name in weight_map.values() if not name.endswith(f".{suffix}")]
    if other:
        raise UserError(f"{index} names {other[0]!r:.100}, which is not a .{suffix} file", "download the file again")
    files = [confined_path(folder, name, index, linked_weights=True) for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}, listed in {index.name}", "download the missing files")
    return files


def _tensor_infos(file: Path) -> Iterator[tuple[str, TensorInfo]]:
    for name, tensor in _iter_tensors(file):
        yield name, TensorInfo(file, tuple(tensor.shape), tensor.dtype)


def _iter_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    check_not_lfs_pointer(file)
    return _iter_safetensors(file) if file.suffix == ".safetensors" else _iter_pickled(file)


def _iter_safetensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    read_safetensors_header(file)
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                yield name, tensors.get_tensor(name)
    except (SafetensorError, RuntimeError) as error:  # RuntimeError: torch cannot create the tensor
        raise UserError(f"{file} cannot be read ({error})", COPY_AGAIN) from error


def _iter_pickled(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        is_zip = zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # zipfile raises it for some damaged ends of files
        is_zip = False
    if not is_zip:
        raise UserError(f"{file} is truncated or not a PyTorch file", COPY_AGAIN)
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"{file} cannot be read ({format_load_error(error)})", COPY_AGAIN) from error
    if not isinstance(state, dict):
        raise UserError(f"{file} contains a {type(state).__name__}, not named tensors", "use a plain checkpoint")
    for name, tensor in state.items():
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor)):
            raise UserError(f"{file} contains {name!r}, which is not a named tensor", "use a plain checkpoint")
        # a stored stride of 0 repeats values: a few bytes can claim a tensor larger than the memory
        if tensor.layout is not torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{file} claims more values for {name} than it contains", COPY_AGAIN)
        yield name, tensor


def _summary(problem: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - MAX_LISTED_NAMES} more" if len(names) > MAX_LISTED_NAMES else ""
    return [f"{problem}: {', '.join(names[:MAX_LISTED_NAMES])}{more}"]
