"""Importing the package: what it exports and what it does not do."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "datasets", "peft", "modelscope", "huggingface_hub", "fastapi", "gradio", "streamlit")


def test_importing_has_no_side_effects():
    """Importing changes no environment, logging or signal handler and loads no torch: all this happens in main()."""
    script = f"""
import importlib, logging, os, pkgutil, signal, sys
environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
import entrypoints, entrypoints.jobs, entrypoints.__main__
names = [module.name for module in pkgutil.iter_modules(entrypoints.jobs.__path__)]
for name in names:
    importlib.import_module("entrypoints.jobs." + name)
assert len(names) >= 9
assert dict(os.environ) == environment
assert signal.getsignal(signal.SIGTERM) == handler
assert logging.getLogger().handlers == []
assert not set({HEAVY}) & set(sys.modules), set({HEAVY}) & set(sys.modules)
assert callable(entrypoints.load_chat)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_package_exports_only_load_chat_and_its_options():
    import entrypoints

    assert entrypoints.__all__ == ["EngineOptions", "load_chat"]
    with pytest.raises(AttributeError, match="no attribute 'load_model'"):
        _ = entrypoints.load_model
