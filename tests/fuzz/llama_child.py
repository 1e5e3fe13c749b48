"""Loads GGUF files whose paths it reads from stdin; a crash of llama.cpp ends this process and not the test."""

import sys
from pathlib import Path

from entrypoints.engines.llamacpp.engine import LlamaCppEngine
from entrypoints.engines.options import EngineOptions
from entrypoints.errors import UserError

if __name__ == "__main__":
    for line in sys.stdin:
        try:
            LlamaCppEngine.load(Path(line.rstrip("\n")), EngineOptions(slots=1, threads=1)).close()
        except UserError:
            print("rejected", flush=True)
        else:
            print("loaded", flush=True)
