"""`glm serve` with the scripted engine: starts at once, and simulates behavior that no real model shows on demand.

Environment: SCRIPTED_GATE, a file that must exist before loading ends; SCRIPTED_LOAD_ERROR (user, defect), the error of
loading; SCRIPTED_UNINTERRUPTIBLE, a delay before a token cannot be cancelled.
"""

import os
import sys
from pathlib import Path

import torch
from scripted_engine import ScriptedEngine

from entrypoints.__main__ import main
from entrypoints.checkpoint.tokenizer import load_tokenizer
from entrypoints.engines import loading
from entrypoints.engines.options import EngineOptions
from entrypoints.errors import UserError


class UninterruptibleEngine(ScriptedEngine):
    """Notices cancellation only between two tokens, like a model in a long forward pass."""

    def generate(self, prompt, sampling, adapter=None, cancelled=None):
        return super().generate(prompt, sampling, adapter, None)


def load_engine(model: Path, options: EngineOptions) -> ScriptedEngine:
    """Replaces engines.loading.load_engine."""
    while "SCRIPTED_GATE" in os.environ and not Path(os.environ["SCRIPTED_GATE"]).exists():
        torch.ones(100_000).exp_()  # releases the GIL, as reading tensors does
    kind = os.environ.get("SCRIPTED_LOAD_ERROR")
    if kind:
        raise UserError("the weights are damaged", "fetch them again") if kind == "user" else ValueError("a defect")
    return (UninterruptibleEngine if "SCRIPTED_UNINTERRUPTIBLE" in os.environ else ScriptedEngine)(
        load_tokenizer(model), options.slots
    )


if __name__ == "__main__":
    loading.check_engine_options = lambda model, options: None
    loading.load_engine = load_engine
    sys.exit(main(["serve", *sys.argv[1:]]))
