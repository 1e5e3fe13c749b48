"""What many tests need: the reference data, and small checkpoints made once a session."""

import json
import os
from importlib import resources
from pathlib import Path

import pytest

from entrypoints.checkpoint.conversion import convert_to_native
from entrypoints.demo.model import write_toy
from entrypoints.prompt import PromptFormat

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of what the reference code computes; its tests skip where it is absent."""
    folder = Path(os.environ.get("GOLDEN_DIR", REPOSITORY.parent / "shared" / "golden"))
    if not folder.is_dir():
        pytest.skip(f"no reference data at {folder} (set GOLDEN_DIR)")
    return folder


@pytest.fixture(scope="session")
def golden_native(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference's tiny checkpoint, converted."""
    target = tmp_path_factory.mktemp("golden") / "native"
    convert_to_native(golden / "original-tiny", target, PromptFormat())
    return target


@pytest.fixture(scope="session")
def sample_rows() -> list[dict]:
    """The bundled ad copy."""
    text = resources.files("entrypoints.demo").joinpath("ad_copy.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="session")
def toy_original(sample_rows: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's untrained toy in the original layout; copy it before changing it."""
    folder = tmp_path_factory.mktemp("toy") / "original"
    write_toy(folder, [row[column] for row in sample_rows for column in ("content", "summary")])
    return folder


@pytest.fixture(scope="session")
def toy_native(toy_original: Path) -> Path:
    """The same toy, converted; copy it before changing it."""
    target = toy_original.parent / "native"
    convert_to_native(toy_original, target, PromptFormat())
    return target
