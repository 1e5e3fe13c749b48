"""Reading a checkpoint folder's tensors, whichever way they are stored: safetensors or .bin, whole or in shards.

Nothing is unpickled beyond plain tensors, and files are mapped, not read, so opening 12 GB takes no memory.
"""

import json
import logging
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from entrypoints.checkpoint.files import refuse_lfs_pointer, safetensors_header
from entrypoints.errors import UserError

logger = logging.getLogger(__name__)
# the preferred format first: its headers can be checked without unpickling anything
FORMATS = (("safetensors", "model", "safetensors"), ("bin", "pytorch_model", "bin"))


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies; `shape` is known without reading it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of a folder by name."""

    folder: Path
    tensors: dict[str, StoredTensor]

    def of_file(self, file: Path) -> dict[str, torch.Tensor]:
        """All tensors of one file, mapped from disk."""
        return dict(_open(file))

    def check(self, expected: dict[str, tuple[int, ...]], optional: frozenset[str] = frozenset()) -> None:
        """Raise UserError naming the tensors that are missing, unknown or of another shape."""
        problems = _listed("missing", [name for name in expected if name not in self.tensors])
        problems += _listed("unknown", [name for name in self.tensors if name not in expected and name not in optional])
        problems += _listed(
            "of another shape",
            [
                f"{name} {list(self.tensors[name].shape)}, not {list(shape)}"
                for name, shape in expected.items()
                if name in self.tensors and self.tensors[name].shape != shape
            ],
        )
        if problems:
            raise UserError(
                f"{self.folder} has tensors {'; '.join(problems)}", "fetch the checkpoint again, config.json too"
            )

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())


def read_json(file: Path) -> dict:
    """A JSON object; raises UserError when the file is missing, an LFS pointer or damaged."""
    if not file.is_file():
        raise UserError(f"{file.parent} holds no {file.name}", "name the folder of a checkpoint")
    refuse_lfs_pointer(file)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error})", "fetch the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} is no JSON object", "fetch the file again")
    return value


def open_tensors(folder: Path) -> TensorFiles:
    """Find and check the weight files of a folder: safetensors if there are any, else .bin.

    Raises UserError naming a missing, truncated or pointer file.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder", "name the folder of a checkpoint")
    for label, stem, suffix in FORMATS:
        files = _weight_files(folder, stem, suffix)
        if files:
            logger.info("reading %d %s file(s) of %s", len(files), label, folder)
            return TensorFiles(folder, {name: tensor for file in files for name, tensor in _stored(file)})
    raise UserError(f"{folder} holds no weights", "it needs model*.safetensors or pytorch_model*.bin")


def _weight_files(folder: Path, stem: str, suffix: str) -> list[Path]:
    index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
    if not index.is_file():
        stray = sorted(folder.glob(f"{stem}-*-of-*.{suffix}"))
        if stray and not single.is_file():
            raise UserError(f"{folder} holds {stray[0].name} but no {index.name}", "fetch the index file too")
        return [single] if single.is_file() else []
    weight_map = read_json(index).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(name, str) for name in weight_map.values())):
        raise UserError(f"{index} has no weight_map of file names", "fetch the file again")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}, which {index.name} lists", "fetch the missing files")
    return files


def _stored(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    for name, tensor in _open(file):
        yield name, StoredTensor(file, tuple(tensor.shape), tensor.dtype)


def _open(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    refuse_lfs_pointer(file)
    again = "copy or download the file again"
    if file.suffix == ".safetensors":
        safetensors_header(file)
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{file} cannot be read ({error})", again) from error
        return
    if not zipfile.is_zipfile(file):
        raise UserError(f"{file} is truncated or no PyTorch file", again)
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        words = (str(error).splitlines() or [repr(error)])[0]
        raise UserError(f"{file} cannot be read ({words[:200]})", again) from error
    if not isinstance(state, dict):
        raise UserError(f"{file} holds a {type(state).__name__}, no tensors by name", "name a plain checkpoint")
    for name, tensor in state.items():
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor)):
            raise UserError(f"{file} holds {name!r}, which is no named tensor", "name a plain checkpoint")
        yield name, tensor


def _listed(what: str, names: list[str], most: int = 4) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{what}: {', '.join(names[:most])}{more}"]
