"""Running commands in this process, without the developer's environment variables."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from entrypoints.__main__ import main
from entrypoints.settings import Settings


@dataclass(frozen=True)
class Outcome:
    """The outcome of a command."""

    code: int
    out: str
    err: str

    def mistake(self) -> str:
        """The error message; asserts that the command failed with a user error and printed nothing else."""
        assert (self.code, self.out) == (1, ""), self
        lines = [line for line in self.err.splitlines() if line.startswith("glm: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """Unset the developer's variables."""
    for name in Settings.__dataclass_fields__:
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def glm(capsys) -> Callable[..., Outcome]:
    """Run a command in this process."""

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def rows_file(tmp_path) -> Callable[..., Path]:
    """Write rows as JSON lines."""

    def write(*rows: dict, name: str = "rows.jsonl") -> Path:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return file

    return write
