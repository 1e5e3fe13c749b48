"""The libraries for newer CPUs that `make llamacpp` compiles: each that runs here, forced by hiding the others."""

import json
import re
import subprocess
import sys

import pytest

from entrypoints.chat_format.sampling import Sampling
from entrypoints.engines.llamacpp import cpu_features
from entrypoints.hardware.resources import cpu_flags

PROGRAM = """
import json, sys
from pathlib import Path
from entrypoints.chat_format.sampling import Sampling
from entrypoints.engines.llamacpp import cpu_features
from entrypoints.engines.llamacpp.engine import LlamaCppEngine
from entrypoints.engines.options import EngineOptions
file, names, prompts = sys.argv[1:]
cpu_features.VARIANTS = {name: cpu_features.VARIANTS[name] for name in json.loads(names)}
engine = LlamaCppEngine.load(Path(file), EngineOptions(threads=2))
greedy = Sampling(max_new_tokens=24, temperature=0)
answers = [[int(id_) for id_ in engine.generate(prompt, greedy)] for prompt in json.loads(prompts)]
print(json.dumps([cpu_features.load_cpu_code(), answers]))
engine.close()
"""
GREEDY = Sampling(max_new_tokens=24, temperature=0)


@pytest.fixture(scope="module")
def folder():
    """The installed libraries."""
    found = cpu_features._variants_folder()
    if not found or not found.is_dir():
        pytest.skip("only the published build of llama.cpp is installed; make llamacpp adds the variants")
    return found


@pytest.fixture
def answers_of(folder, toy_gguf, prompts):
    """The variant that a new process loads if it has only these, and its answers."""

    def run(names):
        command = [sys.executable, "-c", PROGRAM, str(toy_gguf), json.dumps(names), json.dumps(prompts)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads(done.stdout)

    return run


def test_the_folder_has_a_library_for_each_variant(folder):
    assert {file.stem for file in folder.glob("*.so")} == {f"libggml-cpu-{name}" for name in cpu_features.VARIANTS}


@pytest.mark.parametrize("name", cpu_features.VARIANTS)
def test_each_variant_that_this_cpu_can_run_answers_as_transformers(
    name, answers_of, toy_engine, prompts, same_but_for_ties
):
    if missing := cpu_features.VARIANTS[name] - cpu_flags():
        pytest.skip(f"this CPU lacks {', '.join(sorted(missing))}")
    loaded, answers = answers_of([name])
    assert loaded == name
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = [int(id_) for id_ in toy_engine.generate(prompt, GREEDY)]
        same_but_for_ties(answer, expected, toy_engine.model, prompt, GREEDY)


def test_without_a_variant_for_this_cpu_the_published_code_answers(answers_of, toy_engine, prompts, same_but_for_ties):
    loaded, answers = answers_of([])
    assert loaded is None
    expected = [int(id_) for id_ in toy_engine.generate(prompts[0], GREEDY)]
    same_but_for_ties(answers[0], expected, toy_engine.model, prompts[0], GREEDY)


def test_a_library_uses_the_installed_xllamacpp_and_exports_nothing_of_its_own(folder):
    """Otherwise llama.cpp could mix functions of two CPUs."""
    file = next(folder.glob("*.so"))
    dynamic = subprocess.run(["readelf", "--dynamic", file], capture_output=True, text=True, check=True).stdout
    assert "[xllamacpp.abi3.so]" in dynamic
    assert "[$ORIGIN/../xllamacpp]" in dynamic
    assert "ggml-base" not in dynamic
    symbols = subprocess.run(["readelf", "--dyn-syms", file], capture_output=True, text=True, check=True).stdout
    defined = re.findall(r"(?:GLOBAL|WEAK|UNIQUE) +DEFAULT +\d+ (\S+)", symbols)
    assert sorted(defined) == ["ggml_backend_init", "ggml_backend_score"]
