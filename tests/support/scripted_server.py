"""`glm serve` with the scripted engine in place of a real one: starts at once, and does what no model does at will.

Of the environment: SCRIPTED_GATE, a file that must be there before it is loaded; SCRIPTED_LOAD_ERROR (user, defect) if
loading fails; SCRIPTED_STUBBORN if a token takes its seconds whoever leaves.
"""

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from scripted_engine import ScriptedEngine

from entrypoints.__main__ import main
from entrypoints.checkpoint.tokenizer import load_tokenizer
from entrypoints.engines import loading
from entrypoints.errors import UserError


class Stubborn(ScriptedEngine):
    """Hears that nobody wants an answer only between two tokens, like a model in a long step."""

    def generate(self, prompt, sampling, adapter=None, cancelled=None):
        return super().generate(prompt, sampling, adapter, None)


def load(engine: str, model: Path, adapters: Mapping[str, Path], slots: int = 1, **more: object) -> ScriptedEngine:
    """In place of engines.loading.load."""
    while "SCRIPTED_GATE" in os.environ and not Path(os.environ["SCRIPTED_GATE"]).exists():
        time.sleep(0.01)
    kind = os.environ.get("SCRIPTED_LOAD_ERROR")
    if kind:
        raise UserError("the weights are damaged", "fetch them again") if kind == "user" else ValueError("a defect")
    return (Stubborn if "SCRIPTED_STUBBORN" in os.environ else ScriptedEngine)(load_tokenizer(model), slots)


if __name__ == "__main__":
    loading.check = lambda *arguments: None
    loading.load = load
    sys.exit(main(["serve", *sys.argv[1:]]))
